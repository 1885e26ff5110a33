"""Restore noisy pictures and write them: sample.py denoise=.

    options.py  what words say
    tiling.py   a picture in tiles, passes and their mean
    noise.py    what its noise is
    jobs.py     what is done to each plane of a file
    files.py    files and arrays in and out

A model with ANY_SIZE takes pictures of any size, grey or colour, as 8 or 16 bits or floats, and
each is written as it came; one without takes images of its own shape and writes DIR/000000.png ...

Pixels have a black and a white, 0 and 255 in files of 8 bits; what is told of a camera is in the
file's own unit, other levels on the scale from black to white. find_noise and restore_values take
arrays in that unit, restore what a model takes, on the [-1, 1] scale.
"""

from genmodels.restoration.files import denoise, denoise_array
from genmodels.restoration.jobs import Job, jobs_of, restore_values, restored_planes, tiles
from genmodels.restoration.noise import (
    Noise,
    auto_law,
    find_law,
    find_level,
    find_noise,
    to_image,
)
from genmodels.restoration.options import (
    AskedNoise,
    DenoiseOptions,
    RestoreOptions,
    asked_law,
    asked_noise,
    choose_estimator,
    passes,
)
from genmodels.restoration.tiling import (
    SETTINGS,
    SHIFTS,
    cuts,
    ensembled,
    planes,
    restore,
    shifted_mean,
    windows,
)

__all__ = [
    "SETTINGS",
    "SHIFTS",
    "AskedNoise",
    "DenoiseOptions",
    "Job",
    "Noise",
    "RestoreOptions",
    "asked_law",
    "asked_noise",
    "auto_law",
    "choose_estimator",
    "cuts",
    "denoise",
    "denoise_array",
    "ensembled",
    "find_law",
    "find_level",
    "find_noise",
    "jobs_of",
    "passes",
    "planes",
    "restore",
    "restore_values",
    "restored_planes",
    "shifted_mean",
    "tiles",
    "to_image",
    "windows",
]
