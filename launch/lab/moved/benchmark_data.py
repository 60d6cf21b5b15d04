"""`launch.benchmark_data` is `launch.lab.benchmark loading` now."""

from launch.lab.moving import forward

forward("launch.benchmark_data", "launch.lab.benchmark loading")
