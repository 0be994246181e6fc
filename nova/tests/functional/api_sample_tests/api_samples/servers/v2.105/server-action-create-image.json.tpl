{
    "createImage" : {
        "name" : "%(name)s",
        "memory": true,
        "metadata": {
            "meta_var": "meta_val"
        }
    }
}
