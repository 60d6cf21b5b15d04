"""`launch.benchmark` is `launch.lab.benchmark steps` now."""

from launch.lab.moving import forward

forward("launch.benchmark", "launch.lab.benchmark steps")
