"""Docstrings name things with roles, as in :func:`entrgi.generate`, which the site shows as code."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns roles into code."""

    def on_instance(self, *, obj: griffe.Object, **_rest: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
