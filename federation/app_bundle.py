"""The app bundle (FAB) that Flower asks of every run: one generated project file.

It names the *installed* ServerApp. Flower puts the bundle's directory on ``sys.path`` and
then imports the module by name, and the bundle holds no module. Its ClientApp entry is never
loaded, because warm nodes run the installed task.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Final

ConfigValue = bool | int | float | str

_PROJECT: Final = """\
[project]
name = "atoll"
version = "1.0.0"

[tool.flwr.app]
publisher = "atoll"

[tool.flwr.app.components]
serverapp = {app}
clientapp = "atoll.federation.client_app:build"

[tool.flwr.app.config]
{keys}"""


def build(app: str, config: Mapping[str, ConfigValue]) -> bytes:
    """Return the bundle naming ``app`` (``module:attribute``) and each key of ``config``.

    Flower refuses a run's configuration unless the bundle has every key of it, with a value
    of the same type. The same names and types give the same bytes. The list of digests is
    that of flwr 1.41: path, SHA-256 and length in bits.
    """
    keys = "".join(f"{json.dumps(key)} = {_blank(config[key])}\n" for key in sorted(config))
    project = _PROJECT.format(app=json.dumps(app), keys=keys).encode()
    listing = f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{len(project) * 8}".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in (("pyproject.toml", project), (".info/CONTENT", listing)):
            bundle.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def _blank(value: ConfigValue) -> str:
    return json.dumps(type(value)())
