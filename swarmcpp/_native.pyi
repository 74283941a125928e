def abort_callback_address() -> int:
    """Address of a ggml_abort_callback whose user data points at two uint64: abort step, current step."""
