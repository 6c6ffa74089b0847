"""`sealgate`: the commands of the proxy's operator."""
