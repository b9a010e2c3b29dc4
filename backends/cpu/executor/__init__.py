"""Running a program without Python between its kernels: a flat list of instructions in memory planned beforehand."""
