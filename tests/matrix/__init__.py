"""The tests on kernels, interpreters and architectures that this machine is not."""
