"""For all tests: property tests have no deadlines, since a busy machine makes any example slow."""

from hypothesis import settings

settings.register_profile("atoll", deadline=None)
settings.load_profile("atoll")
