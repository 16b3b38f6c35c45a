"""Which row has which sample number: order, mixture, skip windows."""
