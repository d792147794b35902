{ _config+:: { image: 'registry.example/chandra:0.1.0' } }
