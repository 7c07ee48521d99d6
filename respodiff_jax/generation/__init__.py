"""Pictures: which concepts steer which, sampling, and folders of them."""
