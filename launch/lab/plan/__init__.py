"""What a program takes on TPUs or GPUs, compiled ahead of time without one."""
