from launch.lab.moving import forward

forward("launch.benchmark", "launch.lab.benchmark steps")
