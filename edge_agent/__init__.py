"""The program on the device: enrols, installs signed models, serves, watches, reports, trains."""
