"""The rooms of the optimizer core know only the ones below them."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_no_module_imports_itself_by_way_of_others_not_even_for_types() -> None:
    files = {str(p.relative_to(ROOT)): p for p in (ROOT / "fedsim" / "optim").rglob("*.py")}
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for name, p in files.items()}
    graph = {}
    for module, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        graph[module] = (found & modules.keys()) - {module}
    assert "fedsim.optim.backends.emit" in graph["fedsim.optim.backends.emitted"]
    # a package's own file gathers its modules: `from package import module` asks for the module, not for the gathering
    packages = {m for m in modules if modules[m].name == "__init__.py"}
    for module, wanted in graph.items():
        graph[module] = {w for w in wanted if not (w in packages and module.startswith(w + "."))}
    list(TopologicalSorter(graph).static_order())
