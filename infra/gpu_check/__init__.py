"""`make gpu-check`: the CUDA side of Featherweight proven on a machine with a GPU and nothing else.

bundle.py makes, where registries are in reach, a folder to carry: this project, the packages that the machine lacks, and the
script that starts the check there. What runs there: doctor; every stage on CUDA beside the same stage on the CPU; every engine and
compute type, its parity and its speed; a whole optimization; the tests marked `cuda`. Each check is a process with a limit of its
own, and none stops another. Without a GPU all runs that needs none, and the rest says so.
"""
