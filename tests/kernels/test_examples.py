"""The examples in the docstrings of the public functions run, and every function of `__all__` has one."""

import doctest
import importlib
import inspect
import pkgutil

import lcpt_kernels
import pytest

MODULES = [importlib.import_module(f"lcpt_kernels.{m.name}") for m in pkgutil.iter_modules(lcpt_kernels.__path__)]
PUBLIC = {
    f"{module.__name__}.{name}": function
    for module in MODULES
    for name, function in vars(module).items()
    if inspect.isfunction(function) and inspect.unwrap(function).__module__ == module.__name__ and name[0] != "_"
}
EXPORTED = [getattr(lcpt_kernels, name) for name in lcpt_kernels.__all__]
REQUIRED = {name for name, function in PUBLIC.items() if function in EXPORTED}


def has_example(function) -> bool:
    return ">>>" in (function.__doc__ or "")


def test_all_exported_functions_are_found():
    assert len(REQUIRED) == sum(map(inspect.isfunction, EXPORTED)) > 0


@pytest.mark.parametrize(
    "name", sorted(REQUIRED | {name for name, function in PUBLIC.items() if has_example(function)})
)
def test_the_example_runs(name):
    function = PUBLIC[name]
    assert has_example(function), f"{name} has no example"
    failures, names = [], dict(vars(inspect.getmodule(inspect.unwrap(function))))
    runner = doctest.DocTestRunner(verbose=False)
    for example in doctest.DocTestFinder().find(inspect.unwrap(function), name, globs=names):
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)
