"""Files that are all there or not there, whoever else writes them."""

from concurrent.futures import ThreadPoolExecutor

from flexjax.safe_files import write_atomically


def test_of_several_writers_each_writes_a_whole_file(tmp_path):
    path = tmp_path / "figures.json"
    contents = [bytes([letter]) * 4096 for letter in b"abcd"]

    def write_often(data: bytes) -> set[bytes]:
        seen = set()
        for _ in range(20):
            write_atomically(path, data)
            seen.add(path.read_bytes())
        return seen

    with ThreadPoolExecutor(len(contents)) as pool:
        for seen in pool.map(write_often, contents):
            assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [path]
