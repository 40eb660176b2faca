"""Words for all labels of all domains, in the form of ``domain_templates.py``."""

EVERYDAY = {
    "en_US": """
mood = anxious | worried | upset | tired | frustrated | confused | disappointed | uneasy | impatient
month = January | February | March | April | May | June | July | August | September | October |
November | December
weekday = Monday | Tuesday | Thursday | Friday | Sunday || part = morning | afternoon | evening
unit = days | hours | minutes || hours = four | five | six | seven
time = {2-9} days | {2-6} weeks | about {2-8} months | a fortnight | several days | nearly a year
quality = poor | fair | good | broken | better | reduced
home = alone | with a partner | with two children | with elderly parents | in a shared flat
job = nights in a warehouse | as a teacher | at a bakery | in an office | as a driver | as a cleaner
bank = Harborline Bank | Oakvale Trust | Tessera Mutual | Bluemarsh Savings | Fennimore Financial |
Copperfield National | Northquay Bank | Alder and Pike | Summerlea Federal | Quillon Direct
payee = a shoe store | a phone shop | a games website | a gas station | an airline | a pet store
shop = Lumenhaus | Brightnook | Gadgetry Lane | Kettle and Cord | Voltari | Homewick | Plugtown
gadget = wireless speaker | fitness watch | tablet | robot vacuum | headset | camera
product = blender | desk lamp | coffee grinder | tower fan | tea kettle | keyboard | {gadget}
street = Larch | Juniper | Willow | Heron | Quarry | Mill | Chapel | Orchard | Prairie | Sumac |
Foxglove | Beacon | Harvest | Pebble | Lantern | Thistle | Canyon | Meadow | Cobble | Aspen
way = Street | Avenue | Road | Lane | Drive | Court | Way | Place
town = Elmsford | Port Calloway | Cedar Hollow | Marlow Springs | Lake Ostrander | Fairmeade
mailbox = example.com | example.org | example.net | mail.example.com | post.example.org
""",
    "zh_CN": """
mood = 焦虑 | 低落 | 烦躁 | 担心 | 失望 | 着急 | 不安 | 疲惫 | 困惑 || month = {1-12}
weekday = 周一 | 周二 | 周四 | 周五 | 周日 || part = 早上 | 上午 | 下午 | 晚上
time = {2-9}天 | {2-6}周 | {2-8}个月 | 半月余 | 十余天 | 一年多 | 两三天
unit = 天 | 小时 | 分钟 || quality = 差 | 一般 | 尚可 | 较前好转 | 不规律 | 欠佳
home = 独居 | 与配偶同住 | 与两个孩子同住 | 与父母同住 | 与人合租
job = 在仓库上夜班 | 当老师 | 在面包店工作 | 坐办公室 | 开出租车 | 做保洁
bank = 海岸银行 | 橡谷信托 | 蓝泽储蓄 | 北码头银行 | 铜山国民银行 | 夏草联合银行 | 云渡银行
payee = 某鞋店 | 某手机店 | 某游戏网站 | 外地加油站 | 某航空公司 | 某家具城
shop = 明屋电器 | 亮角商城 | 巷里数码 | 壶线家居 | 伏特优选 | 家蔚生活 | 插座小镇
gadget = 无线音箱 | 运动手表 | 平板 | 扫地机 | 耳机 | 相机
product = 榨汁机 | 台灯 | 磨豆机 | 净化器 | 电水壶 | 键盘 | {gadget}
town = 杭州市 | 成都市 | 武汉市 | 西安市 | 长沙市 | 青岛市 | 合肥市 | 昆明市 | 沈阳市 | 南昌市
way = 新桥区 | 云山区 | 柳河区 | 石塘区 | 枫林区 | 白鹭区 | 清溪区 | 南屏区
street = 槐花 | 长堤 | 望月 | 文昌 | 竹影 | 晨光 | 青石 | 桃源 | 松涛 | 银杏 | 荷塘 | 丰收
mailbox = example.com | example.org | example.net | mail.example.com | post.example.org
syllable = an | bo | chen | da | fei | gu | hai | jun | kai | lin | mu | peng | qi | tao | wen
""",
}
