"""This project's ops for a CPU, all of them."""

from internlm3 import kernels
from internlm3.kernels import cpu

globals().update({name: lambda *args, op=getattr(cpu, name), **kwargs: op(*args, **kwargs) for name in kernels.__all__})
