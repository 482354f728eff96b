"Similarity of two networks, layer by layer, and its pictures. Written by hand; the modules are exported from nbs/method."
