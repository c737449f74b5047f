"""What preparing a corpus costs on this machine, on made documents, beside `datasets.map`:

    python scripts/preparing.py FOLDER [--documents 10000 50000 200000] [--timed 12000] [--repeats 3] [--processes N]

`--help` says what each is. FOLDER gets results.json and tables.md; the defaults take half an hour on two cores.
"""

from linformer_hf.benchmark.preparing import main


if __name__ == "__main__":
    main()
