"""The ops as Triton kernels, for GPUs where the CUDA library is not installed.

One module per op holds the kernel, the function that the registry calls in the reference's place, and `SPECS`, from
which ``tests/test_triton_compiled.py`` compiles the kernel ahead of time. :mod:`.common` holds what they share.
Importing this package imports Triton, so the registry does it at an op's first call.

How to add a kernel: write ``safekern/ops/triton/<op>.py`` with a function of the op's name and the reference's
signature; nothing lists it. Check the arguments first with the checks of :mod:`.common` (what a check cannot see
without waiting for the device, the kernel masks off), then launch inside ``with on(device)`` and with ``**LAUNCH``
(or other `launch_options`, which the `Spec` then names).
Streams of consecutive elements go through ``load_run`` and ``store_run``, elements at indices through ``selected``, and
everything that is rounded through ``narrow``, ``root`` and ``quotient``. Name what is launched ``<something>_kernel``
and give it a `Spec` per dtype that matters. The op's tests in ``tests/test_ops.py`` then run on it too, in Triton's
interpreter (``tests/test_triton_interpreted.py``).
"""
