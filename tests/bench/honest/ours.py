"""This project's ops for a CPU, all of them."""

import functools

from internlm3 import kernels
from internlm3.kernels import cpu

globals().update({name: functools.partial(getattr(cpu, name)) for name in kernels.__all__})
