from launch.lab.moving import forward

forward("launch.compile", "launch.lab.plan")
