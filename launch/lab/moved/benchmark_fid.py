from launch.lab.moving import forward

forward("launch.benchmark_fid", "launch.lab.benchmark fid")
