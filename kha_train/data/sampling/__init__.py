"""Maps sample numbers to rows: order, mixture, skip windows."""
