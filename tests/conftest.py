"""What holds for all tests: no time limits on single examples, which a busy machine would break."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fedsim", deadline=None)
settings.load_profile("fedsim")
