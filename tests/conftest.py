"""Strict defaults for every test: see docs/development.md."""

import sys
import types

import jax

# Before anything touches a backend: eight simulated CPU devices.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

import jaxtyping  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402

# Annotations are checked at run time in tests; users pay nothing. The import hook takes
# the checker by name. As for static checkers, an int is a float.
_checker = types.ModuleType("jaxkd_test_typechecker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))
sys.modules[_checker.__name__] = _checker
jaxtyping.install_import_hook("jaxkd", f"{_checker.__name__}.check")
