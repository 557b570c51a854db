"""From SpatialData and AnnData to arrays and back: the one door in and out."""
