from launch.lab.moving import forward

forward("launch.dilemma", "launch.lab.dilemma")
