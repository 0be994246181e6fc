{
    "image_id": "%(id)s"
}
