"""``python -m qtoolkit --cmake-prefix``: where ``find_package(qtoolkit)`` is to look."""

import argparse

from qtoolkit import cmake_prefix_path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qtoolkit")
    parser.add_argument(
        "--cmake-prefix",
        action="store_true",
        required=True,
        help="print what to add to CMAKE_PREFIX_PATH",
    )
    parser.parse_args()
    print(cmake_prefix_path)


if __name__ == "__main__":
    main()
