"""Engines: Flower Grids that run clients on this machine (names here, code in the modules)."""

ENGINES = {
    "serial": "fedsim.engine.serial:SerialGrid",
    "ray": "fedsim.engine.ray:RayGrid",
}
