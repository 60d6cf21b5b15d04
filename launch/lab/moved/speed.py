from launch.lab.moving import forward

forward("launch.speed", "launch.lab.benchmark page")
