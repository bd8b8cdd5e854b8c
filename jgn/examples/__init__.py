"""Programs that show jgn at work."""

import importlib.util

for package in ("matplotlib", "optax", "orbax", "sklearn", "tqdm"):
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{package} is not installed; pip install 'jgn[examples]' brings it.", name=package
        )
