"""Tables that several tests use: products under two Chinese wordings each, and a log over them."""

from __future__ import annotations

import polars as pl

# Twelve products, two ways to name each; written for these tests.
CHINESE_TITLES = (
    ("手冲咖啡细口壶 不锈钢 600毫升", "不锈钢600ml细嘴手冲咖啡壶"),
    ("儿童防水雨鞋 卡通小恐龙", "小恐龙图案儿童雨靴 防水防滑"),
    ("无线蓝牙降噪耳机 头戴式", "头戴式蓝牙耳机 主动降噪 无线"),
    ("纯棉四件套床单被套 1.8米床", "1.8米床品四件套 全棉床单被罩"),
    ("多肉植物陶瓷小花盆 6个装", "陶瓷多肉花盆 迷你 六只"),
    ("便携式折叠露营椅 铝合金", "铝合金露营折叠椅 户外便携"),
    ("高山乌龙茶 清香型 250克", "清香高山乌龙茶叶250g"),
    ("男士运动跑步鞋 网面透气", "透气网面跑鞋 男款运动"),
    ("实木儿童积木玩具 100粒", "100块实木积木 益智玩具"),
    ("厨房电子秤 精准0.1克", "0.1g高精度厨房秤 电子称"),
    ("羊毛围巾女 冬季加厚格子", "格子羊毛围脖 女士冬天加厚"),
    ("猫咪自动饮水机 静音 2升", "2L静音宠物饮水器 猫用自动"),
)


def chinese_items() -> pl.DataFrame:
    """24 items: item_id (string), title, product (0 .. 11, the same for both wordings)."""
    return pl.DataFrame(
        [
            {"item_id": f"商品{product:02d}{'甲乙'[wording]}", "title": title, "product": product}
            for product, titles in enumerate(CHINESE_TITLES)
            for wording, title in enumerate(titles)
        ]
    )


def chinese_events() -> pl.DataFrame:
    """Six users with string ids over 30 days: baskets, and clicks with a query before them."""
    items = chinese_items()["item_id"]
    rows = []
    for day in range(30):
        user, time = f"用户{day % 6}", 1_700_000_000 + day * 86_400
        for place in range(3):
            item = items[(day * 5 + place * 7) % len(items)]
            row = {"user_id": user, "item_id": item, "session_id": f"{user}-{day}"}
            rows.append({**row, "timestamp": time, "action": "click", "query": f"搜索{day % 4}"})
            if place < 2:
                rows.append({**row, "timestamp": time + 600, "action": "purchase", "query": None})
    return pl.DataFrame(rows, schema_overrides={"query": pl.String})
