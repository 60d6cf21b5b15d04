"""The lab: equipment for measuring, planning and comparing. Nothing outside imports it."""
