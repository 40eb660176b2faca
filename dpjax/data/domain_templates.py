"""Plain text tables of ``domains.py``: sentence templates and what goes into their slots.

A table holds ``slot = item | item``, slots parted by ``||``; a line end counts as a space in
English and as nothing in Chinese. ``{slot}`` is filled from the label's own section, from
``[shared]`` or from the words in ``domain_words.py``, ``{3-9}`` with an integer, ``{20-80/20}``
with one in steps of 20, ``{name}`` and the like with the person's values. ``plan`` lists the
sections of a record in order. In dialogues ``A:`` is the agent, ``C:`` the customer, and ``//``
parts the turns. All sentences were written for this library; banks and shops are invented.
"""

TABLES: dict[tuple[str, str], str] = {}

TABLES["medical", "en_US"] = """
[shared]
plan = open+complain+exam+treat+contact | open+complain+past+treat+contact |
open+exam+complain+treat+reach | open+past+exam+treat+contact | open+complain+exam+more+treat+reach
| open+more+complain+treat+contact | open+complain+past+exam+contact |
open+reach+complain+exam+treat | open+complain+past+more+treat+reach || open = {name}, DOB {dob},
MRN {mrn}, was seen on {visit}. | Patient {name} (MRN {mrn}), aged {age}, {came}. | Follow-up for
{name}, born {dob}, record number {mrn}. | {visit}: saw {name}, {age} years old, chart {mrn}, who
{came}. | New referral: {name}, date of birth {dob}, identity number {id_number}. | {name}, aged
{age}, ID {id_number}, {came}. | Telephone review with {name}, MRN {mrn}, on {visit}. | Seen today:
{name}, born {dob}, who {came}. | Discharge note for {name}, MRN {mrn}, admitted on {visit}. |
Clinic letter about {name}, {age}, social security number {id_number}. || came = came in alone | was
sent by the family doctor | arrived with a relative | walked in without an appointment | came back
earlier than planned | asked for a second opinion | was brought in by a neighbor | came for the
yearly check || complain = Reports {sign} for {time}, {course}. | The main concern is {sign},
together with {sign}. | Describes {sign} that began {time} ago, {course}. | Over the past {2-6}
weeks has noticed {sign}, {course}. | Complains of {sign}; also mentions {sign}. | Denies {sign} but
admits to {sign} for {time}. | Came because of {sign} and {sign}, {course}. | First noticed {sign}
{time} ago; now {sign} as well. | {sign} for {time}, no clear trigger. || past = Background:
{history}. | Past history includes {history} and {history}. | Known for {history}; {habit}. |
{habit}, with {history}. | Relevant history: {history}, otherwise {well}. | Has {history} on record,
{habit}. || exam = On examination, {finding}. | Exam and tests show {finding} and {finding}. |
Work-up revealed {finding}; blood pressure {108-149}/{64-92}. | Notable today: {finding}. |
Findings: {finding}, {finding}. | We found {finding}, which is {trend}. | Results are back with
{finding}. || treat = Plan: {act}. | We will {act}, then review in {2-6} weeks. | Agreed to {act}
and {act}. | Decided to {act}; {advice}. | Next step is to {act}. | After discussion we chose to
{act}, and {advice}. | Impression is {trend}; will {act}. || more = Sleep is {quality} and mood is
{mood}. | Lives {home} and works {job}. | No known drug allergies. | Weight {55-104} kg, temperature
{97-99}.{1-9} F. | The patient is {mood} about the results. | Works {job} and sleeps {hours} hours.
| Appetite is {quality}. | {advice}. || contact = Reach the patient at {phone} or {email}. | Results
go to {email}; letter to {address}. | Letter to be posted to {address}. | Home address {address},
phone {phone}. | Please call {phone} with results. | Copy of this note to {email}. | {name} prefers
calls to {phone}. | Confirmed address: {address}. || reach = Phone {phone}. | Call {phone} if plans
change. | Contact: {email}. | Results by mail to {email}. | Lives at {address}. || course = worse
over the last week | coming and going | mostly in the evening | slightly better since yesterday |
unchanged with rest | slowly increasing | worse under stress | not helped by painkillers |
disturbing sleep || habit = smokes {3-20} cigarettes a day | never smoked | drinks wine at weekends
| gave up alcohol | walks daily | takes no regular medicine | vegetarian diet | drinks {2-6} coffees
a day || well = well | fit and active | independent | in good general health || trend = new |
unchanged since the last visit | better than before | worse than last time | borderline | reassuring
|| advice = return at once if it gets worse | written information was given | questions were
answered | family informed | a list of medicines is to be brought next time | a work note was issued
for {2-9} days || sign = tiredness by midday | poor appetite | restless sleep | some weight loss | a
general lack of energy | feeling unwell || history = an appendectomy long ago | mild anxiety | years
of shift work | seasonal allergies | a routine hernia repair || finding = no fever | normal vital
signs | nothing alarming | slightly raised inflammatory markers | a weight loss of {2-5} kg || act =
repeat routine bloods | review the current medicines | continue present treatment | discuss
lifestyle changes | request the old records
[cardiology]
sign = tightness behind the breastbone | a fluttering heartbeat | ankles that swell by evening |
breathlessness on two flights of stairs | near fainting on standing | a pounding pulse at night |
pressure spreading to the left arm | waking up gasping for air || history = high blood pressure | a
stent placed {2-9} years ago | raised cholesterol | a father with a coronary event at {45-60} | a
murmur heard in childhood || finding = an irregular pulse of {88-130} | a systolic murmur at the
apex | an ejection fraction of {35-50} percent | ST depression in the lateral leads | pitting edema
to the shins | a troponin just above the cutoff | left ventricular hypertrophy || act = start
metoprolol {25-100/25} mg daily | book a treadmill stress test | add atorvastatin {20-80/20} mg at
night | fit a {24-72/24}-hour Holter monitor | raise lisinopril to {10-40/10} mg | begin apixaban 5
mg twice daily | restrict salt and give furosemide {20-60/20} mg
[pulmonology]
sign = a cough that brings up yellow phlegm | wheezing in the early morning | breathlessness when
climbing stairs | a tight chest in cold air | blood-streaked sputum once | noisy breathing during
sleep | sharp pain on deep breaths | a dry tickle in the throat || history = {10-40} pack-years of
tobacco | childhood asthma | two bouts of pneumonia | {8-30} years of work with stone dust | hay
fever every spring || finding = scattered expiratory wheeze | oxygen saturation of {88-94} percent |
crackles at the right base | an FEV1 of {45-75} percent predicted | a small nodule in the upper lobe
| a blunted costophrenic angle on film | prolonged expiration || act = prescribe a salbutamol
inhaler as needed | add tiotropium once daily | repeat spirometry after a bronchodilator | give
prednisone {20-40/10} mg for {5-7} days | arrange a CT of the thorax | begin nicotine patches |
order an overnight oximetry
[gastroenterology]
sign = burning after spicy meals | cramps below the navel | loose stools {4-8} times a day |
bloating within an hour of eating | black tarry stools | nausea on waking | food sticking halfway
down | constipation followed by diarrhea || history = a stomach ulcer in {2008-2019} | gallstones |
two colon polyps removed | lactose intolerance | heavy use of ibuprofen || finding = tenderness in
the upper abdomen | a positive stool test for blood | an ALT of {70-180} | mild antral redness on
endoscopy | hyperactive bowel sounds | a fatty liver on ultrasound | a positive urea breath test ||
act = start omeprazole {20-40/20} mg before breakfast | schedule a colonoscopy | try a low-lactose
diet for {2-6} weeks | give two antibiotics against Helicobacter | add soluble fiber and more water
| stop ibuprofen and alcohol | check liver enzymes again
[orthopedics]
sign = a knee that locks on stairs | stiffness in the right shoulder | low back pain after lifting
boxes | a swollen ankle since a fall | grinding in the hip | numb fingers after typing | heel pain
with the first steps | a wrist that hurts on gripping || history = a torn meniscus at {19-35} | an
earlier collarbone fracture | low bone density | years of long-distance running | a metal plate in
the forearm || finding = reduced rotation on the right | a positive drawer sign | joint space
narrowing on X-ray | fluid in the knee | a hairline crack in the fibula | tenderness over the heel |
swelling without redness || act = refer to physiotherapy for {6-12} sessions | fit a brace for {3-8}
weeks | inject triamcinolone 40 mg into the joint | keep weight off with crutches | apply ice and
take naproxen {250-500/250} mg | book an MRI of the spine | plan arthroscopy
[neurology]
sign = throbbing headache on one side | tingling in both feet | a tremor of the right hand at rest |
brief spells of staring | double vision when tired | unsteady walking in the dark | trouble finding
words | dizziness when turning in bed || history = one seizure at age {15-40} | migraine since the
teens | a small stroke in {2012-2020} | a concussion from football | diabetes for {6-20} years ||
finding = brisk reflexes on the left | reduced vibration sense at the toes | a slight facial droop |
slow finger tapping | sharp waves on EEG | scattered white-matter spots on MRI | a wide-based gait
|| act = begin topiramate {25-50/25} mg at night | arrange a brain MRI | raise levetiracetam to
{500-1500/250} mg | start gabapentin {100-300/100} mg | keep a headache diary | order nerve
conduction studies | try sumatriptan 50 mg at onset
"""
TABLES["medical", "zh_CN"] = """
[shared]
plan = open+complain+exam+treat+contact | open+complain+past+treat+contact |
open+exam+complain+treat+contact | open+past+exam+treat+contact |
open+complain+exam+more+treat+reach | open+more+complain+treat+contact |
open+complain+past+exam+contact | open+reach+complain+exam+treat |
open+complain+past+more+treat+reach || open = 患者{name}，{age}岁，病历号{mrn}，{visit}就诊。 |
{visit}接诊{name}，{age}岁，身份证号{id_number}。 | {name}，病历号{mrn}，出生于{dob}，{came}。 |
复诊患者{name}，出生日期{dob}，病历号{mrn}。 | 姓名{name}，证件号{id_number}，{came}。 |
{name}（病历号{mrn}）于{visit}入院，现写出院小结。 | 电话随访{name}，{age}岁，病历号{mrn}。 |
初诊：{name}，{dob}出生，身份证{id_number}。 | 转诊记录：{name}，{age}岁，病历号{mrn}，{came}。 ||
came = 由家属陪同前来 | 独自步行来诊 | 由社区医生转来 | 未预约前来 | 提前复诊 | 要求进一步诊治 |
由邻居送来 | 来做年度检查 || complain = 主诉{sign}{time}，{course}。 | 近{time}反复{sign}，
{course}。 | {time}前出现{sign}，伴{sign}。 | 诉{sign}，同时有{sign}，{course}。 | 否认{sign}，
但有{sign}。 | 因{sign}来诊，已有{time}。 | 最初为{sign}，现又出现{sign}。 | {sign}{time}，
无明显诱因。 || past = 既往{history}。 | 既往{history}，{habit}。 | 病史：{history}，{history}。 |
{habit}，{history}。 | 追问病史，{history}，余无特殊。 | 本人{history}，平素{habit}。 || exam =
查体：{finding}。 | 检查提示{finding}，{finding}。 | 血压{108-149}/{64-92}，{finding}。 |
今日结果回报：{finding}，{trend}。 | 可见{finding}，余未见异常。 | 辅助检查：{finding}。 || treat =
处理：{act}。 | 建议{act}，{advice}。 | 拟{act}，并{act}。 | 与家属商量后决定{act}。 | 下一步{act}，
{2-6}周后复查。 | 考虑{trend}，予{act}。 || more = 睡眠{quality}，情绪{mood}。 | 目前{home}，
{job}。 | 否认药物过敏。 | 体重{50-95}公斤，体温36.{1-9}度。 | 饮食{quality}，二便如常。 |
对结果感到{mood}，{advice}。 | {job}，每晚睡{4-8}小时。 || contact = 联系电话{phone}。 |
家住{address}，电话{phone}。 | 报告发至{email}。 | 结果寄往{address}。 | 手机{phone}，
邮箱{email}。 | 有变化请致电{phone}。 | 现住址：{address}。 || reach = 电话{phone}。 |
手机号{phone}已核对。 | 邮箱{email}。 | 有事请拨{phone}。 | 住{address}。 || course = 近日加重 |
时轻时重 | 傍晚明显 | 昨日稍缓解 | 休息后无改善 | 逐渐加重 | 劳累时明显 | 服止痛药无效 | 影响睡眠 ||
habit = 每日吸烟{3-20}支 | 从不吸烟 | 周末少量饮酒 | 已戒酒 | 每天散步 | 长期素食 |
每天喝{2-5}杯咖啡 | 未规律服药 || trend = 新出现的问题 | 与上次相仿 | 较前好转 | 较上次加重 |
情况尚可 | 尚需观察 || advice = 加重随时来诊 | 已发放书面说明 | 已解答疑问 | 已告知家属 |
下次带齐用药清单 | 开具病假{2-9}天 || sign = 乏力 | 食欲不振 | 睡眠不安 | 体重下降 | 精神不佳 |
浑身不适 || history = 曾切除阑尾 | 有轻度焦虑 | 长年倒班 | 有季节性过敏 | 做过疝气手术 || finding =
体温正常 | 生命体征平稳 | 未见明显异常 | 炎症指标略高 | 体重减轻{2-5}公斤 || act = 复查常规血检 |
核对现有用药 | 维持目前治疗 | 调整生活方式 | 调取旧病历
[cardiology]
sign = 胸骨后压榨感 | 心慌心跳漏拍 | 傍晚脚踝浮肿 | 上两层楼气促 | 起身时眼前发黑 | 夜间脉搏狂跳 |
左臂放射样酸胀 | 夜里憋醒坐起 || history = 有高血压 | {2-9}年前放过支架 | 血脂偏高 |
父亲{45-60}岁患冠脉病 | 幼时听到过杂音 || finding = 脉律不齐，每分钟{88-130}次 | 心尖区收缩期杂音 |
射血分数{35-50}% | 侧壁导联ST段压低 | 小腿凹陷性水肿 | 肌钙蛋白轻度升高 | 左室肥厚 || act =
美托洛尔{25-100/25}毫克每日一次 | 安排平板运动试验 | 睡前加阿托伐他汀{20-40/20}毫克 |
佩戴{24-72/24}小时动态心电图 | 缬沙坦增至{80-160/80}毫克 | 口服利伐沙班抗凝 | 限盐并用呋塞米
[pulmonology]
sign = 咳嗽咯黄痰 | 清晨喘息 | 爬楼时喘不上来 | 遇冷空气胸闷 | 痰中带血丝 | 睡觉打鼾很响 |
深呼吸时刺痛 | 咽痒干咳 || history = 烟龄{10-40}年 | 幼年患哮喘 | 得过两次肺炎 | 接触石粉{8-30}年 |
每年春季花粉症 || finding = 双侧散在哮鸣音 | 血氧饱和度{88-94}% | 右下肺湿啰音 |
第一秒呼气量占预计值{45-75}% | 上叶小结节 | 肋膈角变钝 | 呼气相延长 || act = 按需吸入沙丁胺醇 |
加用噻托溴铵每日一吸 | 复查通气功能 | 泼尼松{20-40/10}毫克口服{5-7}天 | 安排胸部CT |
使用尼古丁贴片戒烟 | 做整夜血氧监测
[gastroenterology]
sign = 吃辣后烧心 | 脐周绞痛 | 每日稀便{4-8}次 | 饭后腹胀 | 黑便 | 晨起恶心 | 吞咽时有梗阻感 |
便秘与腹泻交替 || history = {2008-2019}年患溃疡 | 有胆结石 | 切除过两枚结肠息肉 | 乳糖不耐受 |
常年服布洛芬 || finding = 上腹压痛 | 大便潜血阳性 | 转氨酶{70-180} | 胃镜见黏膜充血 | 肠鸣音亢进 |
超声提示脂肪肝 | 呼气试验阳性 || act = 早餐前奥美拉唑{20-40/20}毫克 | 预约结肠镜 |
低乳糖饮食{2-6}周 | 给予两种抗生素除菌 | 增加膳食纤维和饮水 | 停用布洛芬并戒酒 | 复查肝酶
[orthopedics]
sign = 下楼膝盖卡住 | 右肩僵硬 | 搬重物后腰痛 | 摔倒后脚踝肿胀 | 髋部有摩擦感 | 打字后手指发麻 |
晨起足跟痛 | 握物时手腕痛 || history = {19-35}岁半月板撕裂 | 锁骨骨折过 | 骨量减少 | 多年长跑 |
前臂留有钢板 || finding = 右侧旋转受限 | 抽屉试验阳性 | X线示关节间隙变窄 | 膝部积液 |
腓骨细微裂纹 | 跟骨压痛 | 局部肿胀不红 || act = 理疗{6-12}次 | 支具固定{3-8}周 | 局部注射曲安奈德 |
拄拐避免负重 | 冰敷并服塞来昔布 | 预约脊柱核磁 | 安排关节镜手术
[neurology]
sign = 单侧搏动性头痛 | 双脚发麻 | 右手静止时抖动 | 短暂发呆愣神 | 疲劳时视物成双 | 夜间走路不稳 |
想不起词语 | 翻身时天旋地转 || history = {15-40}岁抽搐过一次 | 少年起偏头痛 | {2012-2020}年小卒中 |
踢球致脑震荡 | 患糖尿病{6-20}年 || finding = 左侧腱反射活跃 | 足趾振动觉减退 | 口角轻度歪斜 |
手指轮替缓慢 | 脑电图见尖波 | 核磁见散在白质点 | 步基增宽 || act = 睡前托吡酯{25-50/25}毫克 |
安排头颅核磁 | 左乙拉西坦加至{500-1500/250}毫克 | 加巴喷丁{100-300/100}毫克 | 写头痛日记 |
查肌电图 | 发作时服佐米曲普坦
"""
TABLES["financial", "en_US"] = """
[shared]
plan = open+issue+detail+tried+contact | open+issue+tried+ask+contact |
open+issue+detail+ask+contact | open+feel+issue+tried+contact | open+issue+detail+feel+contact |
open+tried+issue+ask+reach | open+issue+tried+feel+ask+reach | open+detail+issue+reach+ask || open =
My name is {name} and I bank with {bank}, account {account}. | I am writing about {bank}, where my
account number is {account}. | To the complaints team: I am {name}, customer of {bank}, card {card}.
| This complaint against {bank} is from {name}, account {account}. | {name} here, a {bank} customer
for {2-19} years, card number {card}. | Please look into {bank} for me. I am {name}, SSN
{id_number}. | I, {name}, of {address}, complain about {bank}. | Regarding {bank} and account
{account}: I need help. | Dear regulator, my name is {name} and {bank} has let me down. || issue =
On {date} {event}. | In {month}, {event}, and then {event}. | The problem is that {event}. | It
began on {date}, when {event}. | First {event}. Later {event}. | I found out on {date} that {event}.
| Without any warning, {event}. || detail = I want to add that {fact}. | What makes it worse is that
{fact}. | Note that {fact}, and {fact}. | You should know that {fact}. | This is odd because {fact}.
| To be clear, {fact}. | {fact}. || tried = I called {2-9} times and {reply}. | When I complained to
{bank}, {reply}. | After {2-8} weeks of waiting, {reply}. | So far {reply}. | I spoke to a manager,
but {reply}. | I went to a branch on {date}; {reply}. | First {reply}, then {reply}. || ask = I
would like {wish}. | All I want is {wish}. | My request is {wish}. | I expect {wish} within
{10-30/5} days. | It would be fair {wish} and {wish}. | Please act: I want {wish}. || feel = I am
{mood} about all this. | I have been a loyal customer for {3-20} years. | This cost me {3-30} hours
and a lot of sleep. | My family depends on this money. | I feel {mood} and {mood}. | Rent is due and
I am {mood}. | It is {mood2} that a bank can act like this. || contact = Call me at {phone} or write
to {address}. | My email is {email} and my phone is {phone}. | I live at {address}. | For
verification my SSN is {id_number}; phone {phone}. | Please answer by email to {email}. | Signed,
{name}, {phone}, {email}. | The card concerned is {card}; my email is {email}. | You can check this
under SSN {id_number} or account {account}. | Send papers to {name}, {address}. || reach = Call
{phone}, card {card}. | Email: {email}. | My card is {card}, my phone {phone}. | My number is
{phone}. | Reply to {email}. || mood2 = absurd | unfair | hard to believe | outrageous | not right
|| event = I found a serious mistake | the figures did not match my own | something on my file
changed | I received a confusing letter || fact = I have kept every letter | this had never happened
before | I always read what I sign | I have screenshots of everything || reply = nobody called back
| I was transferred {3-6} times | they promised an answer in {5-15} days | the case number was lost
| I got an automatic email || wish = to get a written apology | to receive an honest answer | to be
paid ${50-300/50} for my time | to speak to one person who decides
[unauthorized_transactions]
event = {2-5} charges from {payee} appeared that I never made | ${180-950} was gone overnight |
someone paid for a hotel abroad in my name | cash of ${200-600/20} was withdrawn in a town I have
never visited | an online wallet was topped up without my approval | a stranger cloned my plastic |
a transfer of ${400-2900/50} went to a person I do not know || fact = my wallet never left my pocket
| I was {200-900/50} miles away at that hour | no passcode was ever sent to me | I had answered a
fake text message the day before | the police gave me a report number || reply = the fraud desk said
the chip had been read | my claim was denied within {2-9} days | they told me I must have shared my
PIN | a provisional credit was given and taken back | I was asked to prove where I was || wish = to
have the stolen money restored | to see the evidence behind the denial | to have those purchases
reversed | to know who used my PIN
[account_fees]
event = an overdraft charge of ${25-39} hit me {2-6} times in one week | a monthly maintenance fee
of ${8-25} began without notice | I was billed for paper statements I never ordered | a currency
markup of {3-6} percent was added | the promised opening bonus of ${150-400/50} was not paid |
payments were reordered so that more of them bounced | closing my savings cost ${30-75/5} || fact =
the brochure promised free checking | my balance was always above ${500-1500/500} | no change of
terms was mailed | my deposit was held for {3-9} days | the app showed enough funds that morning ||
reply = a clerk gave back only one of them | they said it is in the fine print | the branch called
it a courtesy matter | they offered a more expensive package instead | the same charge returned the
next month || wish = to have those charges waived | to get a clear price list | to receive the bonus
I was promised | to close everything without a penalty
[mortgage_servicing]
event = my escrow payment jumped by ${120-480} | the loan was sold and {2-3} payments went missing |
the modification I applied for was refused | my property tax was not paid in time | a foreclosure
notice was taped to my door | extra principal was posted as interest | the payoff figure changed
{2-5} times || fact = I have proof of every installment | the appraisal came in at ${180-420},000 |
I submitted the hardship papers {2-4} times | my homeowner policy never lapsed | the rate lock had
not run out || reply = each agent asked for the same tax forms again | underwriting went silent for
{4-9} weeks | they returned my check | the escrow analysis was not explained | one point of contact
was promised and never named || wish = to receive a corrected escrow statement | to have
installments posted to the right month | to get a fair review of the modification | to stop the sale
of the house
[debt_collection]
event = a collector rang me {4-9} times in one day | a letter demanded ${300-2800/10} for a bill
settled years ago | they called my employer about me | a firm I never heard of threatened to sue |
my wages were garnished without a hearing | strangers left messages with my neighbor | ${60-240/5}
in interest was added to an old medical bill || fact = the original creditor shows that I owe zero |
the statute of limitations ran out in {2015-2020} | I asked for validation by certified mail | it
belongs to a person with a similar name | the bill was discharged in bankruptcy || reply = the
caller refused to give a mailing address | they hung up when I asked for proof | validation was
never sent | they offered a discount if I paid that day | a supervisor shouted at me || wish = to
see proof of what is owed | to stop the calls to my workplace | to have a letter that says I owe
nothing | to be contacted only by mail
[credit_reporting]
event = my score fell by {40-120} points overnight | an account that is not mine shows on my report
| a late mark from {2016-2021} is still listed | the bureau mixed my file with a relative's | {2-6}
hard inquiries appeared that I did not allow | a loan I paid off is still shown as open | an address
I never lived at was listed || fact = a lender turned me down because of it | I mailed copies of my
passport | the furnisher confirmed the mistake | I froze my file in {month} | two of three bureaus
already removed it || reply = the bureau answered with a form letter | they said the furnisher had
verified it | my upload was called unreadable | the entry vanished and came back | the portal would
not accept my dispute || wish = to have the wrong entry deleted | to separate my file from the other
person's | to get a full copy of the investigation | to remove the inquiries
"""
TABLES["financial", "zh_CN"] = """
[shared]
plan = open+issue+detail+tried+contact | open+issue+tried+ask+contact |
open+issue+detail+ask+contact | open+feel+issue+tried+contact | open+issue+detail+feel+contact |
open+tried+issue+ask+contact | open+issue+tried+feel+ask+reach | open+detail+issue+ask+contact ||
open = 我叫{name}，是{bank}的客户，账号{account}。 | 本人{name}，身份证号{id_number}，
现投诉{bank}。 | 投诉{bank}，我的账号是{account}。 | 我是{name}，在{bank}用卡{card}已有{2-15}年。 |
监管部门您好，我叫{name}，要反映{bank}的问题。 | 我是{bank}的老客户{name}，卡号{card}。 |
关于{bank}账户{account}，我要投诉。 | {name}，住{address}，投诉{bank}。 || issue = {date}，
{event}。 | {month}月以来，{event}，后来{event}。 | 问题是{event}。 | 事情从{date}开始，{event}。 |
先是{event}，接着{event}。 | 我{date}才发现{event}。 | 没有任何通知，{event}。 || detail =
需要说明的是{fact}。 | 更气人的是{fact}。 | {fact}，而且{fact}。 | 事实上{fact}。 |
奇怪的是{fact}。 | {fact}。 || tried = 我打了{2-9}次电话，{reply}。 | 向{bank}反映后，{reply}。 |
等了{2-8}周，{reply}。 | 到现在{reply}。 | 找过经理，可是{reply}。 | {date}去了网点，{reply}。 |
先是{reply}，后来{reply}。 || ask = 我要求{wish}。 | 我只希望{wish}。 | 请{10-30/5}天内{wish}。 |
请尽快{wish}，并{wish}。 | 诉求：{wish}。 || feel = 我感到非常{mood}。 | 我是{3-15}年的老客户了。 |
为这事跑了{3-9}趟，觉都睡不好。 | 家里就靠这笔钱生活。 | 又{mood}又{mood}。 | 房租要到期了，
心里很{mood}。 | 银行这样做实在{mood2}。 || contact = 电话{phone}，住址{address}。 | 邮箱{email}，
手机{phone}。 | 请寄到{address}。 | 身份证{id_number}可核实，电话{phone}。 | 请回复邮箱{email}。 |
联系人{name}，{phone}。 | 涉及卡号{card}，邮箱{email}。 | 请按身份证{id_number}查询。 || reach =
电话{phone}。 | 邮箱{email}。 | 卡号{card}。 | 手机{phone}。 || mood2 = 荒唐 | 不公平 | 难以置信 |
过分 | 不讲理 || event = 我发现一处严重差错 | 数字和我自己记的对不上 | 我的资料被改动 |
我收到一封看不懂的信 || fact = 所有信件我都留着 | 以前从没出过这种事 | 我签字前都仔细看 |
截图我都保存了 || reply = 没有人回电 | 被转接了{3-6}次 | 答应{5-15}天内答复却没有 | 工单号被弄丢 |
只收到自动回复 || wish = 书面道歉 | 如实答复 | 赔偿误工费{100-500/50}元 | 派专人处理
[unauthorized_transactions]
event = {payee}有{2-5}笔消费不是我刷的 | 一夜之间少了{1800-9500/100}元 |
有人用我的名义在国外订酒店 | 在我没去过的城市被取现{2000-6000/500}元 | 钱包未经我同意被充值 |
磁条被陌生人复制 | {4000-9000/500}元转给了陌生人 || fact = 钱夹从没离身 |
当时我在{200-900/50}公里外 | 没有收到任何验证码 | 前一天我点过假短信 | 派出所已经立案 || reply =
反诈专线说芯片读取成功 | 我的申请{2-9}天就被驳回 | 说是我泄露了密码 | 先垫付又扣回去 |
要我证明人在哪里 || wish = 追回被盗的钱 | 出示驳回的证据 | 撤销那几笔消费 | 查明是谁用了密码
[account_fees]
event = 一周内被收{2-6}次透支罚金 | 突然每月扣{5-25}元管理费 | 没订过的纸质对账单也收钱 |
换汇被多加{2-5}个点 | 承诺的开户奖励{100-400/50}元没给 | 扣款顺序被打乱导致多次退票 |
销户要收{20-80/10}元 || fact = 宣传单写着免年费 | 余额一直在{1000-5000/1000}元以上 |
没寄过条款变更 | 存款被压了{3-9}天 | 当天早上应用里余额充足 || reply = 柜员只退了一次 |
说小字条款里有写 | 网点说退钱只是人情 | 反而推销更贵的套餐 | 下个月照样又扣 || wish = 免掉这些收费 |
给出清楚的价目表 | 兑现开户奖励 | 免费销户
[mortgage_servicing]
event = 月供突然多了{300-1900/100}元 | 贷款转让后{2-3}笔还款不见了 | 申请延期还款被拒 |
抵押物的税没有按时代缴 | 门上贴了拍卖房子的通知 | 提前还的本金被记成利息 | 结清金额改了{2-5}次 ||
fact = 每笔月供我都有凭证 | 房子评估值{180-420}万元 | 困难证明交了{2-4}遍 | 房屋保单从没断过 |
锁定的利率仍然有效 || reply = 每个专员都要同样的收入证明 | 审批{4-9}周没消息 | 把我的还款退回来了 |
月供怎么算的没人说明 | 说有专属经理却一直没派 || wish = 更正月供明细 | 把还款记到对应的月份 |
公平复核延期申请 | 停止拍卖房子
[debt_collection]
event = 一天接到{4-9}个催款电话 | 来信追讨早已还清的{300-2800/100}元 | 他们打到我单位去了 |
没听过的公司威胁起诉我 | 没开庭工资就被扣 | 陌生人给邻居留话说要上门 |
旧医药费被加了{60-240/10}元利息 || fact = 原债权人显示余额为零 | 诉讼时效{2015-2020}年就过了 |
我寄挂号信要求出示原件 | 当事人只是和我同名 | 法院早已裁定免除 || reply = 对方不肯说公司地址 |
一要证据就挂电话 | 原件始终没寄来 | 说当天还可以打折 | 主管对我大吼 || wish = 出示借款合同 |
停止骚扰我的单位 | 开一份不欠款的证明 | 只用书面联系我
[credit_reporting]
event = 评分一夜掉了{40-120}分 | 报告上多了不是我的账户 | {2016-2021}年的逾期还挂着 |
我的档案和亲戚的混在一起 | 多了{2-6}次我没授权的查询 | 还清的贷款仍显示未结清 |
报告里出现我没住过的地址 || fact = 因为它我被拒贷 | 我寄过护照复印件 | 报送机构承认是弄错 |
{month}月我申请了冻结档案 | 另外两家机构已经删掉 || reply = 机构只回了格式信 | 说报送方已确认属实 |
说我上传的材料看不清 | 条目消失后又回来 | 网站不接受我的异议 || wish = 删除错误条目 |
把我和别人的档案分开 | 提供完整核查材料 | 清除那些查询记录
"""
TABLES["support", "en_US"] = """
[shared]
plan = hello+verify+probe+solve | hello+probe+verify+solve+bye | hello+verify+solve+bye |
hello+verify+solve+reach | hello+probe+solve+reach2+bye | hello+more+verify+solve |
hello+verify+probe+reach || hello = C: Hi, {problem}. | C: Hello, {problem}, and {detail}. | A:
Welcome to {shop}, how can I help? // C: {problem}. | C: Good {part}. {problem}. | A: {shop}
support, good {part}. // C: I am {mood}: {problem}. | C: I have shopped at {shop} since {month}. Now
{problem}. | C: Is anyone there? {problem}. | A: Hello, what can I do for you? // C: Well,
{problem}. || verify = A: {sorry} May I have your name and email? // C: {name}, {email}. You can
also call {phone}. | A: {sorry} Who am I speaking with, and what is your customer number? // C:
{name}, {account}. | A: Please give me your name, phone and customer number. // C: It is {name},
{phone}, number {account}. | A: {sorry} Name and address on the order, please? // C: {name},
{address}, phone {phone}. | A: Can you confirm your identity? // C: {name}, customer number
{account}, email {email}. | A: Which card did you use? // C: {card}, in the name of {name}, email
{email}. | A: {sorry} Your account number and email? // C: {account} and {email}, {name}. | A: I
need your full name first. // C: {name}. My phone is {phone}, my email {email}. || probe = A: Could
you tell me more? // C: {detail}. | A: When did this begin? // C: {when}, and {detail}. | A: Did
anything else happen? // C: Yes, {detail}. | A: Is there something we missed? // C: Well, {detail}.
| A: Anything I should know? // C: {detail}. Also, {detail}. | C: I should add that {detail}. | A:
Thanks. Is there more? // C: Only that {detail}. || solve = A: Thank you. {step}. | A: {check}
{step}. | A: {step}, and {promise}. | A: I see it now. {step}. // C: And then? // A: {step}. | A: No
problem, {step}. | A: {check} {step}; {promise}. | C: So what now? // A: {step}. || more = C:
{detail}. // A: {check} | C: How long will it take? // A: About {2-9} {unit}. | C: I have been
waiting {2-9} {unit}. // A: {sorry} | A: Did you get our message? // C: No, {detail}. | C: Can you
hurry? {detail}. // A: Of course. | A: One moment. // C: Sure, I am {mood} though. || bye = C:
{thanks} // A: {closing} | C: {thanks} | A: Anything else? // C: No. {thanks} | C: Fine, I am
{mood2} now. // A: {closing} | C: I hope so. // A: {closing} || reach = A: Where can we reach you?
// C: On {phone}. // A: {step}. | A: Shall I write to {email}? // C: Yes. // A: Good, {step}. | C:
Call me on {phone}. // A: Will do; {step}. | A: Do you still live at {address}? // C: Yes. // A:
Then {step}. || reach2 = A: Your name and number for the file? // C: {name}, {phone}, customer
{account}. | A: Who should I put down? // C: {name}, {email}, or {phone}. | A: I only need your
customer number. // C: {account}, {name}, phone {phone}. | A: To finish, your name and address? //
C: {name}, {address}. Phone {phone}. || mood2 = happy | relieved | satisfied | content | glad ||
sorry = I am sorry to hear that. | That sounds annoying. | I understand. | Thanks for telling us. |
Let me look into it. | My apologies. | Sure, I can help. || when = {2-9} days ago | last {weekday} |
on {date} | this {part} | about a week ago || check = Let me check. | I found your file. | Thanks
for waiting. | I have it on my screen. | One second. | That explains it. || promise = you will get
an email about it | I will follow up on {weekday} | it costs you nothing | it takes {2-9} {unit} | I
added ${5-20/5} as an apology || thanks = Thanks a lot. | Great, thank you. | That helps. | Perfect.
| Okay, thanks. | Good, I will wait. | Finally, thank you. || closing = Have a nice {part}. | Glad
to help. | You are welcome. | Take care. | Thank you for your patience. | Bye for now. || problem =
something is not right with my last order | I have a question about my purchase | I am not happy
with what happened last week | I need some help with my {product} || detail = I have waited {2-9}
days | I wrote to you before | it is quite urgent | I have screenshots | it never happened before ||
step = I have made a note of it | I will pass this to a colleague | a specialist will write to you
today | I am looking into it right now
[returns_and_refunds]
problem = the {product} I ordered is the wrong model | I sent the {product} back and still have no
money | the {product} is not as pictured and I want my cash back | I was charged twice for one
{product} | the {product} came in a color I did not pick | I changed my mind about the {product} |
only half of what I paid came back to me || detail = the box is unopened | I posted it {6-20} days
ago with your label | the receipt says ${40-290} | the seal is intact | my bank shows nothing yet |
it was a gift and I have no invoice | the store turned me away || step = a prepaid label is on its
way to you | I have approved the full amount of ${40-290} | the money will reach your bank in {3-7}
business days | I can offer store credit or an exchange | please drop the box at any pickup point |
I waived the restocking charge | we will swap it for the right color
[delivery_problem]
problem = my {product} was due {3-9} days ago and is not here | tracking has not moved since {date}
| the courier says my {product} was left with a neighbor | the parcel with my {product} was soaked |
one of {2-4} boxes never came | it was marked as received but I got nothing | my {product} went to
my old street || detail = the map shows it in a depot {40-300/20} miles away | nobody rang the bell
| the neighbor knows nothing | I checked the porch and the mailroom | the carton was torn open | I
need it before the weekend | the driver has no photo || step = I have opened a trace with the
carrier | a replacement ships tonight by express | the depot will call you before {5-8} this evening
| I corrected the street in our system | the van returns tomorrow morning | I asked the driver for a
photo | you may collect it from the locker
[account_access]
problem = I cannot sign in since I changed phones | the reset email never comes | it says my
password is wrong {3-6} times in a row | my profile was locked overnight | the verification code
arrives too late | someone changed my login without asking me | I forgot which email I registered
with || detail = I looked in the spam folder | my old number is gone | the code is always expired |
I tried {2-4} browsers | I saw a visit from another city | the security question is not mine | I use
an authenticator || step = I sent a fresh reset link | I removed the lock and signed out all devices
| please choose a new passphrase of {10-16} characters | the old number is replaced | I turned
two-step codes off for an hour | our security team will check the foreign visit | you can now enter
with a one-time link
[technical_fault]
problem = my {product} will not turn on | the {product} makes a loud humming noise | the app crashes
when I open settings | my {gadget} drops the wireless link every {5-20} minutes | the battery of my
{gadget} is empty after {2-3} hours | the screen stays black after the update | error E{11-79} shows
on the {product} || detail = I already tried another outlet | it began after version {3-9}.{1-9} | a
restart helps for a minute | the red light blinks {3-7} times | I cleaned the filter | it is only
{2-11} months old | the cable fits loosely || step = please hold the power button for {10-30/5}
seconds | please install the patch from {date} | resetting it to factory settings should help | I
booked a repair slot | please try the spare cable in the box | we can pair it again from the menu |
I sent the log to our engineers
[subscription_change]
problem = I want to move to the smaller plan | I want to cancel my membership before it renews | I
was moved to the yearly tier without asking | I would like to pause for {2-4} months | I want to add
{2-4} people to my plan | the trial ended earlier than you said | the student discount vanished from
my plan || detail = the next payment is due on {date} | I hardly use it | the page only lets me
upgrade | my course is over | I pay ${9-39} a month now | my partner has a plan already | I never
agreed to the longer term || step = I moved you to the basic tier from next month | renewal is
switched off | the pause starts on {date} | I put the old price back for {3-12} months | you keep
everything until {date} | I sent an invitation for the extra seats | the discount is active again
"""
TABLES["support", "zh_CN"] = """
[shared]
plan = hello+verify+solve+bye | hello+verify+probe+solve | hello+probe+verify+solve |
hello+verify+more+solve | hello+verify+solve | hello+probe+solve+reach2 | hello+verify+reach ||
hello = C: 你好，{problem}。 | C: 您好，{problem}，{detail}。 | A: {shop}为您服务，
请问有什么可以帮您？ // C: {problem}。 | C: {part}好，{problem}。 | A: {part}好，这里是{shop}。 //
C: 我很{mood}，{problem}。 | C: 我{month}月在{shop}下过单，现在{problem}。 | C: 在吗？{problem}。 |
A: 您好，请讲。 // C: 是这样，{problem}。 || verify = A: {sorry}请提供姓名和邮箱。 // C: {name}，
{email}，手机{phone}。 | A: {sorry}请问您的姓名和客户号？ // C: {name}，{account}，手机{phone}。 |
A: 请报一下姓名、手机和客户号。 // C: {name}，{phone}，{account}。 | A: {sorry}订单的姓名和地址是？
// C: {name}，{address}，电话{phone}。 | A: 请核实身份。 // C: {name}，客户号{account}，
手机{phone}。 | A: 您用哪张卡付的？ // C: {card}，户名{name}，手机{phone}。 | A:
{sorry}客户号和邮箱是？ // C: {account}，{email}，我叫{name}。 | A: 先请问您的全名。 // C: {name}，
电话{phone}，客户号{account}。 || probe = A: 能说具体些吗？ // C: {detail}。 | A: 什么时候开始的？
// C: {when}，{detail}。 | A: 还有别的情况吗？ // C: 有，{detail}。 | A: 我们漏了什么吗？ // C:
{detail}。 | A: 还要补充吗？ // C: {detail}，还有{detail}。 | C: 补充一下，{detail}。 | A: 明白，
还有吗？ // C: 就是{detail}。 || solve = A: 谢谢。{step}。 | A: {check}{step}。 | A: {step}，
{promise}。 | A: 我看到了，{step}。 // C: 然后呢？ // A: {step}。 | A: 没问题，{step}。 | A:
{check}{step}，{promise}。 | C: 那怎么办？ // A: {step}。 || more = C: {detail}。 // A: {check} | C:
要多久？ // A: 大约{2-9}{unit}。 | C: 我等了{2-9}{unit}了。 // A: {sorry} | A: 收到我们的短信了吗？
// C: 没有，{detail}。 | C: 能快点吗？{detail}。 // A: 好的。 | A: 请稍等。 // C: 行，
我很{mood}。 || bye = C: {thanks} // A: {closing} | C: {thanks} | A: 还有别的需要吗？ // C: 没了，
{thanks} | C: 行，这下{mood2}了。 // A: {closing} | C: 希望如此。 // A: {closing} || reach = A:
怎么联系您？ // C: 打{phone}。 // A: {step}。 | A: 邮箱还是{email}吗？ // C: 是的。 // A: 好，
{step}。 | C: 请打我手机{phone}。 // A: 好的，{step}。 | A: 还住在{address}吗？ // C: 对。 // A:
那么{step}。 || reach2 = A: 请留姓名和电话。 // C: {name}，{phone}，邮箱{email}。 | A:
登记在谁名下？ // C: {name}，{email}，手机{phone}。 | A: 只差您的客户号。 // C: {account}，{name}，
手机{phone}。 | A: 最后，姓名和地址？ // C: {name}，{address}，电话{phone}。 || mood2 = 放心 |
满意 | 踏实 | 开心 | 清楚 || sorry = 非常抱歉。 | 理解您的心情。 | 明白了。 | 谢谢您告诉我们。 |
我来看看。 | 给您添麻烦了。 | 可以的。 || when = {2-9}天前 | 上{weekday} | {date} | 今天{part} |
大概一周前 || check = 我查一下。 | 找到您的资料了。 | 让您久等了。 | 信息我看到了。 | 请稍等。 |
原来如此。 || promise = 稍后有短信通知您 | {weekday}我再跟进 | 不收您任何费用 | 大约{2-9}{unit} |
另送您{5-20/5}元券 || thanks = 多谢。 | 太好了，谢谢。 | 这样就行。 | 好的，谢谢。 | 那我等着。 |
总算好了，谢谢。 || closing = 祝您{part}愉快。 | 很高兴帮到您。 | 不客气。 | 请保重。 |
感谢您的耐心。 | 再见。 || problem = 上次的订单不太对 | 我想问一下买的东西 | 上周的事我不满意 |
{product}的事想请你们帮忙 || detail = 已经等了{2-9}天 | 之前也写信问过 | 挺急的 | 我有截图 |
以前没这样过 || step = 我已经记录下来 | 我转给同事处理 | 今天专员会写信给您 | 我正在为您核实
[returns_and_refunds]
problem = 买的{product}型号不对 | {product}寄回去了钱还没到 | {product}和图片不一样，想要回钱 |
一台{product}扣了两次款 | {product}颜色不是我选的 | {product}我不想要了 | 付的钱只回来一半 ||
detail = 盒子没拆 | 用你们的单子寄出{6-20}天了 | 小票上是{140-990/10}元 | 封条完好 |
银行卡里没到账 | 别人送的，没有发票 | 门店不给办 || step = 预付运单马上发给您 |
全款{140-990/10}元已批准 | {3-7}个工作日内到账 | 可以换货或给您购物金 | 请把盒子放到任一驿站 |
手续费已免除 | 给您换成对的颜色
[delivery_problem]
problem = {product}晚了{3-9}天还没到 | 物流从{date}起没动过 | 快递说{product}放邻居家了 |
装{product}的包裹泡水了 | {2-4}个箱子少来一个 | 显示已签收，可我没收到 | {product}送到旧地址去了 ||
detail = 地图上还在{40-300/20}公里外的仓库 | 没人按门铃 | 邻居说不知道 | 门口和收发室都找过 |
纸箱被撕开了 | 周末前要用 | 司机没有照片 || step = 已向承运方发起查件 | 今晚加急补发一件 |
站点{5-8}点前给您打电话 | 街道名我已更正 | 明早再派车送一次 | 已让司机补照片 | 您可以去快递柜自取
[account_access]
problem = 换手机后登不上去 | 重置邮件一直收不到 | 连续{3-6}次提示密码错误 | 账户一夜之间被锁 |
验证码总是来得太晚 | 有人改了我的登录名 | 忘了当初用哪个邮箱注册 || detail = 垃圾箱也看过了 |
旧手机号已经停用 | 验证码每次都过期 | 换过{2-4}个浏览器 | 看到有外地登录 | 密保问题不是我设的 |
我用的是动态口令 || step = 新的重置链接已发出 | 已解锁并退出所有设备 | 请设{10-16}位新密码 |
旧手机号已替换 | 两步验证先关一小时 | 安全组会核查外地登录 | 现在可用一次性链接进入
[technical_fault]
problem = {product}开不了机 | {product}嗡嗡响得厉害 | 一点设置应用就闪退 |
{gadget}每{5-20}分钟断一次网 | {gadget}的电池{2-3}小时就没电 | 更新后屏幕一直黑 |
{product}显示错误E{11-79} || detail = 换过插座了 | 升到{3-9}.{1-9}版之后开始的 | 重启只能好一分钟 |
红灯闪{3-7}下 | 滤网洗过了 | 才用了{2-11}个月 | 线插上很松 || step = 请长按电源键{10-30/5}秒 |
请装{date}的补丁 | 恢复出厂设置应该可以 | 已为您约好维修 | 请试试盒里的备用线 |
在菜单里重新配对即可 | 日志已交给工程师
[subscription_change]
problem = 我想换成小套餐 | 想在续费前退掉会员 | 没问我就改成了年付 | 想暂停{2-4}个月 |
想给套餐加{2-4}个人 | 试用比说的提早结束 | 学生优惠没有了 || detail = 下次扣费是{date} |
我基本不用 | 页面上只能升级 | 课程已经结束 | 现在每月{19-69}元 | 家里人已经有一份 |
长期的我没同意过 || step = 下月起改为基础档 | 自动续费已关闭 | 暂停从{date}开始 | 原价保留到年底 |
{date}前权益不变 | 加人的邀请已发出 | 优惠重新生效
"""
