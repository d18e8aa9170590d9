"""The fork server imports this before it forks: what each rank would otherwise compile or ask for by itself."""

from functools import cache

import cpuinfo

from pipeline.data import digest, resize

digest.compiled()
resize.compiled()
# DeepSpeed asks it for every optimizer in host memory, and it starts two processes for the answer.
cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
