"""One file per codec; a codec is chosen by the name of its file. `base` says what a codec offers."""
