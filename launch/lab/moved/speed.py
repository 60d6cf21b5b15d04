"""`launch.speed` is `launch.lab.benchmark page` now."""

from launch.lab.moving import forward

forward("launch.speed", "launch.lab.benchmark page")
