"""Headers of shops and data sets, and how their columns become fields."""

import json
from pathlib import Path

import pytest

from eclip.dataloading.errors import Rejection
from eclip.dataloading.tables.columns import ALIASES, FIELDS, compact, parse_columns
from tests.dataloading.tables.table_files import read, refusal, table_of

SHOPIFY = """Handle,Title,Body (HTML),Vendor,Product Category,Type,Tags,Variant SKU,Image Src,Image Position,Status
lamp,Desk lamp,<p>x</p>,ACME,,Lamps,a,L-1,a.jpg,1,active
lamp,,,,,,,L-2,b.jpg,2,
lamp,,,,,,,L-3,,,
sofa,Sofa,,ACME,,Sofas,,S-1,c.jpg,1,active
"""
MERCHANT = """id\ttitle\tdescription\tlink\timage_link\tadditional_image_link\tgoogle_product_category\titem_group_id
1r\tShirt red\tx\thttps://s/1\ta.jpg\tb.jpg,c.jpg\tShirts\tshirt
1b\tShirt blue\tx\thttps://s/2\tb.jpg\t\tShirts\tshirt
2\tLamp\tx\thttps://s/3\td.jpg\t\tLamps\t
"""
WOOCOMMERCE = """ID,Type,SKU,Name,Published,Categories,Images,Parent
10,simple,L1,Desk lamp,1,Home > Lamps,"a.jpg, b.jpg",
11,variable,S1,Sofa,1,Home > Sofas,c.jpg,
"""
AMAZON = """uniq_id,Product Name,Category,Image,Selling Price
e1,Desk lamp,Lamps,a.jpg|b.jpg,$3
e2,Sofa,Sofas,c.jpg,$9
"""
MAGENTO = """sku,attribute_set_code,product_type,categories,name,base_image,small_image,additional_images
L1,Default,simple,Default/Lamps,Desk lamp,/a.jpg,/a.jpg,"/b.jpg,/c.jpg"
S1,Default,simple,Default/Sofas,Sofa,/d.jpg,/d.jpg,
"""
KAGGLE = """,id,gender,masterCategory,subCategory,articleType,productDisplayName,filename
0,1163,Men,Apparel,Topwear,Tshirts,Sahara shirt,a.jpg
1,1164,Men,Apparel,Topwear,Tshirts,Blue shirt,b.jpg
"""
FACTS = {
    "shopify": (SHOPIFY, "t.csv", [("lamp", "Desk lamp", "Lamps", "a.jpg"), ("lamp", "Desk lamp", "Lamps", "b.jpg")]),
    "merchant": (MERCHANT, "t.txt", [("shirt", "Shirt red", "Shirts", "a.jpg b.jpg c.jpg")]),
    "woocommerce": (WOOCOMMERCE, "t.csv", [("10", "Desk lamp", "Home > Lamps", "a.jpg b.jpg")]),
    "amazon": (AMAZON, "t.csv", [("e1", "Desk lamp", "Lamps", "a.jpg b.jpg")]),
    "magento": (MAGENTO, "t.csv", [("L1", "Desk lamp", "Default/Lamps", "a.jpg b.jpg c.jpg")]),
    "kaggle": (KAGGLE, "t.csv", [("1163", "Sahara shirt", "Apparel", "a.jpg")]),
    "headless": (
        "name;assets;facets\nDesk lamp;a.jpg;Lamps\n",
        "t.csv",
        [("Desk lamp", "Desk lamp", "Lamps", "a.jpg")],
    ),
    "capitals": ("PRODUCT;TITLE;CATEGORY;IMAGE\nP;T;C;a.jpg\n", "t.csv", [("P", "T", "C", "a.jpg")]),
    "camel": ("productId,productTitle,productType,imageUrl\nP,T,C,a.jpg\n", "t.csv", [("P", "T", "C", "a.jpg")]),
    "blanks": (
        " Product ID , Product-Name ,\xa0Category\u200b, Image Path \nP,T,C,a.jpg\n",
        "t.csv",
        [("P", "T", "C", "a.jpg")],
    ),
}


@pytest.mark.parametrize("content, name, expected", FACTS.values(), ids=FACTS)
def test_tables_as_programs_export_them(tmp_path: Path, content: str, name: str, expected: list) -> None:
    rows, _ = read(tmp_path, content, name)
    found = [(row.product, row.title, row.category, " ".join(row.images)) for row in rows]
    assert found[: len(expected)] == expected


def test_rows_of_further_images_have_the_facts_of_the_row_before(tmp_path: Path) -> None:
    rows, rejected = read(tmp_path, SHOPIFY)
    assert [(row.number, row.product, row.sku) for row in rows] == [
        (1, "lamp", "L-1"),
        (2, "lamp", "L-2"),
        (4, "sofa", "S-1"),
    ]
    assert [(r.where, r.reason) for r in rejected] == [("t.csv, row 3", "no image")]
    others = "product,title,category,image\nP1,a,A,a.jpg\nP2,,,b.jpg\nP1,,,c.jpg\nP1,,B,d.jpg\n"
    rows, rejected = read(tmp_path, others)
    assert [row.number for row in rows] == [1, 3]  # the row before is the last one that was usable
    assert [(r.where, r.reason) for r in rejected] == [("t.csv, row 2", "no title"), ("t.csv, row 4", "no title")]


def test_variants_are_one_product_and_rows_without_a_group_have_their_own_id(tmp_path: Path) -> None:
    rows, rejected = read(tmp_path, MERCHANT, "t.tsv")
    assert [(row.product, row.sku) for row in rows] == [("shirt", "1r"), ("shirt", "1b"), ("2", "2")] and not rejected
    lines = "\n".join(table_of(tmp_path, MERCHANT, "t.tsv").summary())
    assert "product <- item_group_id (where empty: id)" in lines
    assert "image <- image_link, additional_image_link" in lines and "not used: description, link" in lines
    nan = MERCHANT.replace("Lamps\t\n", "Lamps\tnan\n")
    assert read(tmp_path, nan, "t.tsv")[0][2].product == "2"
    assert read(tmp_path, MERCHANT, "t.tsv", columns={"product": "id"})[0][0].product == "1r"


def test_the_report_tells_how_the_table_was_understood(tmp_path: Path) -> None:
    table = table_of(tmp_path, "name;assets;price\nDesk lamp;a.jpg|b.jpg;3\nSofa;x.jpg;4\n")
    assert table.summary() == [
        "t.csv: 2 rows, separator semicolon, encoding UTF-8",
        "  columns: product <- name; title <- name; image <- assets",
        "  no product id: rows of one name are one product (--column product=NAME)",
        "  no category: every product gets the category 'all' (--column category=NAME)",
        "  not used: price",
        f"  images: several in a cell are separated by '|'; 2 of 3 looked up are below {tmp_path / 'photos'}",
    ]
    assert {row.category for row in table.rows([])} == {"all"}


def test_of_several_candidates_the_first_that_is_filled_is_taken_and_said(tmp_path: Path) -> None:
    content = "id,title,name,Type,department,image\nP1,t,n,simple,Lamps,a.jpg\n"
    table = table_of(tmp_path, content)
    (row,) = table.rows([])
    assert (row.title, row.category) == ("t", "Lamps")
    assert "  title: title was preferred to name (--column title=NAME for another)" in table.summary()
    assert "  category: department was preferred to Type (--column category=NAME for another)" in table.summary()
    (row,), _ = read(tmp_path, content.replace(",t,", ",,"))
    assert row.title == "n"
    (row,), _ = read(tmp_path, content, columns={"title": "NAME", "category": "type"})
    assert (row.title, row.category) == ("n", "simple")


@pytest.mark.parametrize("column", ["Product Title", "product_title", "PRODUCTTITLE", "productTitle"])
def test_names_are_compared_by_letters_and_digits(tmp_path: Path, column: str) -> None:
    content = f"id,{column},text,category,image\nP1,a,b,A,a.jpg\n"
    assert read(tmp_path, content)[0][0].title == "a"
    assert read(tmp_path, content, columns={"title": "TEXT"})[0][0].title == "b"
    assert read(tmp_path, content, columns={"title": "product title"})[0][0].title == "a"
    twin = f"id,{column},ProductTitle,category,image\nP1,a,b,A,a.jpg\n"
    assert "may be title" in refusal(tmp_path, twin) and "--column title=" in refusal(tmp_path, twin)


def test_names_in_other_scripts(tmp_path: Path) -> None:
    content = "商品,标题,类别,图片\nP1,红椅子,椅子,a.jpg\n"
    assert "no column for title and image" in refusal(tmp_path, content) and "图片" in refusal(tmp_path, content)
    told = {"product": "商品", "title": "标题", "category": "类别", "image": "图片"}
    assert read(tmp_path, content, columns=told)[0][0].title == "红椅子"


@pytest.mark.parametrize("missing", ["title", "image"])
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_a_missing_column_is_answered_with_those_found(tmp_path: Path, missing: str, name: str) -> None:
    cells = {"product": "P1", "title": "a", "image": "a.jpg"} | {"colour": "red"}
    cells["what"] = cells.pop(missing)
    content = f"{','.join(cells)}\n{','.join(cells.values())}\n" if name == "t.csv" else json.dumps(cells)
    message = refusal(tmp_path, content, name)
    assert f"no column for {missing}" in message and ", ".join(cells) in message
    assert f"--column {missing}=NAME" in message
    assert len(read(tmp_path, content, name, columns={missing: "what"})[0]) == 1


def test_a_table_without_a_header_says_that_the_first_line_names_the_columns(tmp_path: Path) -> None:
    message = refusal(tmp_path, "P1,chair,A,a.jpg\n" * 3)
    assert "the first line must name the columns" in message and "and it has: P1, chair" in message
    assert "delete the lines" not in message


def test_a_wide_table_is_listed_in_part(tmp_path: Path) -> None:
    names = ",".join(f"c{n}" for n in range(500))
    assert "and 470 more" in refusal(tmp_path, f"{names}\n{names}\n")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"titel": "title"}, "unknown field 'titel'; the fields are product, title"),
        ({"title_": "title"}, "unknown field 'title_'"),
        ({"title": "nmae"}, "--column title=nmae: no such column; the table has: product, title"),
        ({"title": ""}, "title cannot be left out"),
        ({"image": ""}, "image cannot be left out"),
        ({"attribute_x": "nowhere"}, "no such column"),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_impossible_columns_are_refused(tmp_path: Path, given: dict, message: str, name: str) -> None:
    cells = {"product": "P1", "title": "a", "category": "A", "image": "a.jpg"}
    content = f"{','.join(cells)}\n{','.join(cells.values())}\n" if name == "t.csv" else json.dumps(cells)
    assert message in refusal(tmp_path, content, name, columns=given)


def test_columns_on_the_command_line() -> None:
    assert parse_columns(["title=name", "image = a=b", "source="]) == {"title": "name", "image": "a=b", "source": ""}
    for given in (["title"], ["title=a", "title=b"]):
        with pytest.raises(ValueError, match="--column title"):
            parse_columns(given)


def test_names_that_do_not_print_stay_on_one_line(tmp_path: Path) -> None:
    line = json.dumps({"id": 1, "a\nb": "t", "\ud800": 1, "image": "a.jpg", "attribute_x\ny": ["\ud800"]})
    assert "has: id, a\\nb, \\ud800, image" in refusal(tmp_path, line, "t.jsonl")
    table = table_of(tmp_path, line, "t.jsonl", columns={"title": "a\nb"})
    assert "title <- a\\nb" in table.summary()[1] and all(text.isprintable() for text in table.summary())
    _, rejected = read(tmp_path, line, "t.jsonl", columns={"title": "a\nb"})
    assert rejected[0].reason.startswith("attribute_x\\ny holds")


def test_optional_columns_are_left_out_when_told(tmp_path: Path) -> None:
    content = "product,title,category,image,source,sku\nP1,a,A,a.jpg,amazon,s1\n"
    rows, rejected = read(tmp_path, content)
    assert not rows and "unknown source" in rejected[0].reason and "amazon" in rejected[0].detail
    leave = {"source": "", "sku": "", "category": "", "product": ""}
    (row,), _ = read(tmp_path, content, columns=leave)
    assert (row.source, row.sku, row.category, row.product) == ("detail", "a", "all", "a")


def test_languages_and_attributes(tmp_path: Path) -> None:
    header = "product,title,category,image,Title_DE,title_fr,Attribute_Colour,attribute_size,farbe"
    content = header + "\nP1,a,A,a.jpg,Stuhl,nan,rot,,x\n"
    (row,), _ = read(tmp_path, content)
    assert row.titles == {"de": "Stuhl"} and row.attributes == {"Colour": "rot"}
    (row,), _ = read(
        tmp_path, content, columns={"attribute_Colour": "farbe", "title_fr": "Title_DE", "title_it": "title"}
    )
    assert row.attributes["Colour"] == "x" and row.titles == {"de": "Stuhl", "fr": "Stuhl", "it": "a"}
    assert "both title_de" in refusal(tmp_path, content.replace("title_fr", "title_de"))
    only = content.replace("title,", "title_en,", 1)
    (row,), _ = read(tmp_path, only)
    assert row.title == "a" and row.titles["en"] == "a"


def test_json_keys_are_mapped_like_headers(tmp_path: Path) -> None:
    lines = [{"ID": n, "Name": f"n{n}", "imagePaths": ["a.jpg"], "extra": 1} for n in range(3)]
    lines.append({"Name": "n3", "imagePaths": "b.jpg", "ID": 3, "categories": "late"})
    table = table_of(tmp_path, "\n".join(map(json.dumps, lines)), "t.jsonl")
    assert "  columns: product <- ID; title <- Name; category <- categories; image <- imagePaths" in table.summary()
    rejected: list[Rejection] = []
    assert [row.product for row in table.rows(rejected)] == ["3"]
    assert {r.reason for r in rejected} == {"no category"}


def test_lists_of_json_lines_are_no_texts_where_another_column_is(tmp_path: Path) -> None:
    line = {
        "asin": "P1",
        "title": "a",
        "main_category": "Home",
        "categories": [["Home", "Lamps"]],
        "imagePath": ["a.jpg"],
    }
    (row,), _ = read(tmp_path, json.dumps(line), "t.jsonl")
    assert row.category == "Home"
    _, rejected = read(tmp_path, json.dumps(line), "t.jsonl", columns={"category": "categories"})
    assert rejected[0].reason.startswith("category is a list, not text: ")


def test_the_image_column_is_the_first_whose_files_are_there(tmp_path: Path) -> None:
    content = "id,title,image,filename\nP1,a,https://shop/a.jpg,a.jpg\nP2,b,https://shop/b.jpg,b.jpg\n"
    rows, _ = read(tmp_path, content)
    assert [row.images for row in rows] == [("a.jpg",), ("b.jpg",)]
    numbered = "id,title,image_2,image_1,image_10,Image3\nP1,a,b.jpg,a.jpg,d.jpg,c.jpg\n"
    assert read(tmp_path, numbered)[0][0].images == ("a.jpg", "b.jpg", "c.jpg", "d.jpg")


def test_every_alias_is_found_under_its_own_name() -> None:
    assert set(ALIASES) == set(FIELDS)
    for field, aliases in ALIASES.items():
        assert aliases[0] == field and len(set(aliases)) == len(aliases) and all(compact(a) == a for a in aliases)
    assert not set(ALIASES["title"]) & set(ALIASES["product"]) | set(ALIASES["image"]) & set(ALIASES["category"])
