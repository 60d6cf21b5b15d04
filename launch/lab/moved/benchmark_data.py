from launch.lab.moving import forward

forward("launch.benchmark_data", "launch.lab.benchmark loading")
