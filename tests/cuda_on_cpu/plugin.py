"""A pytest plugin: the ops run on the library that SAFEKERN_CUDA_ON_CPU names, instead of the CPU kernels."""

import os

import torch

from safekern import ops
from safekern.ops.registry import Served

torch.ops.load_library(os.environ["SAFEKERN_CUDA_ON_CPU"])
ops.BACKENDS["cpu"] = Served("cpu", {})
