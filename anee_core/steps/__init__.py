"""Ways to run a layer: by the model's own modules, in C++, as captured graphs; now or deferred."""
