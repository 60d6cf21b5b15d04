from launch.lab.moving import forward

forward("launch.equivalence", "launch.lab.equivalence")
