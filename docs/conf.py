"""Sphinx: the site of docs/*.md and of all docstrings; `scripts/docs` builds it, warnings are errors."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import mach  # noqa: E402

project, author, copyright = "mach", "the authors of mach", "the authors of mach"
version = release = mach.__version__
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["api/modules.rst"]
nitpicky = True
suppress_warnings = ["ref.python"]  # several classes have an ``n_classes``: a link may lead to any of them
default_role = "py:obj"
html_theme = "alabaster"
html_title = "mach"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {
    "description": "Extreme classification by hashed, independent repetitions",
    "fixed_sidebar": True,
    "page_width": "70rem",
    "sidebar_width": "15rem",
}
html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": str(ROOT / "mach"),
        "exclude_patterns": [str(ROOT / "mach/serving/annif.py")],  # it registers itself in a program that is not there
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "max_depth": 3,
        "automodule_options": {"members"},
    }
]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["triton"]  # it is not there where this site is built
autodoc_typehints = "none"  # signatures stay readable; docstrings say shapes and dtypes
numpydoc_show_class_members = False


def setup(app: Any) -> dict[str, bool]:
    """Connect what is below."""
    app.add_html_math_renderer("mathml", (_inline, None), (_displayed, None))
    app.connect("missing-reference", _exists)
    app.connect("autodoc-skip-member", _is_foreign)
    return {"parallel_read_safe": True}


def _is_foreign(app: Any, what: str, name: str, member: Any, *others: Any) -> bool | None:
    """Leave out what is not ours to explain: pydantic's own attribute, functions that other libraries made."""
    is_made_elsewhere = inspect.isroutine(member) and not (getattr(member, "__module__", "") or "").startswith("mach")
    return True if name == "model_config" or is_made_elsewhere else None


def _inline(writer: Any, node: nodes.math) -> None:
    """Formulas as MathML, which browsers draw themselves: no script, no network."""
    writer.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _displayed(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def _mathml(node: Any, as_block: bool) -> str:
    try:
        return latex2mathml.tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def _exists(app: Any, env: Any, node: Any, contents: Any) -> Any:
    """Names in docstrings that have no entry of their own: private ones, parameters, names of other libraries.

    They stay plain where they exist; where they do not, Sphinx goes on to complain.
    """
    if node.get("refdomain") != "py":
        return None
    if node["reftype"] == "class":  # what stands where numpydoc has types: "int64 array of shape (N,)"
        return contents
    module, owner = node.get("py:module") or "mach", node.get("py:class")
    packages = [module.rsplit(".", n)[0] for n in range(1 + module.count("."))]
    for scope in [*([f"{module}.{owner}"] if owner else []), module, *packages, ""]:
        if _found(f"{scope}.{node['reftarget']}".strip(".")):
            return contents
    return None


def _found(path: str) -> bool:
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for name in parts[n:]:
            fields = getattr(value, "model_fields", {}) | getattr(value, "__dataclass_fields__", {})
            if name in fields or name in getattr(value, "__annotations__", {}):
                return True
            if not hasattr(value, name):
                return name in _parameters(value) or (inspect.isclass(value) and _is_assigned(value, name))
            value = getattr(value, name)
        return True
    return False


def _parameters(value: Any) -> Any:
    try:
        return inspect.signature(value).parameters
    except (TypeError, ValueError):
        return {}


def _is_assigned(owner: type, name: str) -> bool:
    """Whether a class gives its instances an attribute of that name."""
    return re.search(rf"\bself\.{re.escape(name)}\b.*=", inspect.getsource(owner)) is not None
