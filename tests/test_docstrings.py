"""What the docstrings say: the examples run, and everything public says what it takes."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import safekern

MODULES = [
    module.name
    for module in pkgutil.walk_packages(safekern.__path__, "safekern.")
    if not re.search(r"__main__|\._C_|ops\.triton", module.name)
]


@pytest.mark.parametrize(
    "name", [name for name in MODULES if ">>>" in inspect.getsource(importlib.import_module(name))]
)
def test_examples(name):
    """Those that need a model of some size are marked to be skipped."""
    ran = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not ran.failed


def public():
    """The functions and classes of the package and of the submodules that it names, and their methods."""
    for module in (safekern, *(value for name, value in vars(safekern).items() if name in safekern.__all__)):
        if not inspect.ismodule(module):
            continue
        for name, value in vars(module).items():
            listed = name in getattr(module, "__all__", ()) or getattr(value, "__module__", "") == module.__name__
            if not listed or name.startswith("_") or not callable(value) or inspect.getmodule(value) is None:
                continue
            yield f"{module.__name__}.{name}", value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", function


@pytest.mark.parametrize(("name", "value"), [pytest.param(*found, id=found[0]) for found in public()])
def test_what_is_public_is_documented(name, value):
    doc = inspect.getdoc(value)
    assert doc
    # Masks and scores come from other functions, and an error or a record is not made by hand.
    if name.endswith((".Mask", ".Scores")) or (inspect.isclass(value) and ("Attributes:" in doc or "Error" in name)):
        return
    for parameter in inspect.signature(value).parameters:
        assert parameter in ("self", "cls") or re.search(rf"^ +{parameter}: ", doc, re.MULTILINE), parameter
    assert (inspect.isfunction(value) and "." in value.__qualname__) or ">>>" in doc, "no example"
