"""Words by which a text names the option that it means, in the languages of data sets.

Data alone: `choice_labels` and `choice` make their patterns of them. An underscore stands for a
space. The lists called bare belong to scripts that are written without spaces; their words may
touch any character. All others are whole words.
"""

# "The answer is B", "Antwort: B": what names an answer …
ANSWERS = (
    "answer ans solution response selection pick guess verdict conclusion antwort lösung réponse "
    "reponse respuesta resposta risposta ответ antwoord odpowiedź cevap jawaban jawabannya الإجابة "
    "الجواب उत्तर"
)
ANSWERS_BARE = "答案 正解 答え 解答 回答 정답 답 คำตอบ đáp_án trả_lời"
# … an option, which is the answer only if a copula follows …
OPTIONS = (
    "option choice letter alternative opción opcion opção alternativa letra opzione вариант optie "
    "correct_option correct_choice right_option right_choice best_option best_choice"
)
OPTIONS_BARE = "选项 選項 选择 選擇"
COPULAS = (
    "is are was seems looks appears would_be must_be should_be could_be might_be has_to_be "
    "seems_to_be ist lautet est es é è"
)
COPULAS_BARE = "'s 应该是 應該是 就是 是 为 為 は : = > →"
# … and what else may stand between either and the letter, several of these too.
FILLERS = (
    "to here most likely probably definitely clearly obviously certainly surely therefore thus "
    "indeed simply only correct right best final option choice letter either both the it die der "
    "das la le les el adalah الصحيحة هي هو है это it's that's c'est richtige correcte correcta "
    "correta corretta bonne this question for that"
)
FILLERS_BARE = "应该 應該 应 應 选 選 项 項 が 은 는 คือ là - – — | ) ]"
FINALS = "final ultimate endgültige finale final_es 最终 最終"  # "the final answer is B"

# "so B", "I choose B", "it is B": weaker, as more often it is no option that follows.
CONCLUSIONS = (
    "so thus therefore hence consequently overall finally ergo choose chose choosing pick picked "
    "select selected selecting say think believe prefer go_with going_with going_for went_with "
    "vote_for opt_for is be it's that's probably maybe perhaps definitely certainly surely "
    "clearly obviously likely correct daher deshalb folglich sondern wähle nehme denke glaube ist "
    "donc choisis pense est c'est entonces por_tanto por_lo_tanto sino elijo escojo creo es logo "
    "portanto escolho acho é quindi dunque scelgo penso è поэтому значит следовательно выбираю "
    "думаю это kies dus wybieram seçiyorum pilih "
    "leaves leaving leaves_us_with leaving_us_with"
)
CONCLUSIONS_BARE = "所以 因此 故 应 應 选 選 是 为 為 よって したがって 따라서 그러므로 ตอบ chọn"

# "B is correct", "B ist richtig", "B是正确答案" …
ARTICLES = "the a most more only clearly definitely obviously la le die der das el"
PRAISES = (
    "correct right best answer choice option true accurate one appropriate solution match likely "
    "plausible better richtig richtige korrekt correcte correcta correto correta corretta bonne "
    "bon juste vrai vraie certa giusta verdadera verdadeira верно верен правильно правильный"
)
PRAISES_BARE = (
    "都对 都對 都正 是正 是对 是對 是答 正确 正確 对 對 が正 は正 です 입니다 이_정답 가_정답 번"
)
# "B fits best", "B would fit", "only B remains" …
FITS = "fits suits matches applies works_best best_fits best_suits best_matches best_describes"
FIT = "fit suit match apply work"
MODALS = "would should must might could can will may seems_to appears_to would_best"
REMAINS = "remains"
# … "C is", behind "B isn't right;" …
AUXILIARIES = "is was does would ist est es"
# … and "A is wrong", "A can't be it", "A不对" …
ADVERBS = "not also clearly definitely obviously simply just both all"
BLAMES = (
    "not wrong incorrect false invalid out impossible unlikely excluded eliminated irrelevant "
    "nicht falsch faux fausse incorrecte incorrecta incorreta falsa errada errata sbagliata pas "
    "неверно неправильно"
)
DENIALS = (
    "isn't aren't wasn't can't cannot doesn't does_not do_not don't won't n'est wrong incorrect не "
    "no_es não_é"
)
BLAMES_BARE = "不 错 錯 是错 是錯 排除 被排除 ではな 는_아니 은_아니"
# … and "not A", "neither A nor B", "rather than A", "不是A" …
NOTS = (
    "not isn't don't do_not doesn't didn't wouldn't can't cannot neither nor never except "
    "excluding without than unlike nicht kein keine weder noch pas ni não nem né non no не ни"
)
NOTS_BARE = "不 非 排除 没"
# … and "if the answer is A", "I don't think it is A".
SUPPOSED = (
    "if whether suppose supposing assuming unless wenn falls si se если don't_think do_not_think "
    "i_doubt don't_believe do_not_believe wouldn't_say"
)

SUPPOSED_BARE = "如果 假如 もし"

# "B, because …": what follows names no option any more.
REASONS = (
    "because since due given considering explanation reason reasoning rationale rather instead not "
    "and_not but_not it_is as_shown as_seen as_the as_it as_this for_sure of_course "
    "weil denn erklärung statt parce car puisque explication porque pues explicación pois "
    "explicação perché poiché spiegazione потому объяснение omdat ponieważ karena"
)
REASONS_BARE = "因为 因為 由于 由於 理由 解释 解釋 解析 原因 なぜなら だから 왜냐하면"

# "A and B", "A or maybe B".
JOINS = "and AND plus und et y e и"
JOINS_BARE = "和 与 與 及 以及 跟 と 와 과"
DOUBTS = "or OR and/or nor versus vs oder ou o или"
DOUBTS_BARE = "或者 或 还是 還是 か または 또는"
HEDGES = "maybe perhaps possibly also even both either"
# "A, but possibly B", "A, though B is possible too".
CONCESSIONS = "but however aber mais pero ma mas но though although or"
POSSIBLY = (
    "possibly perhaps maybe potentially conceivably might_be might_also_be could_be could_also_be "
    "may_be may_also_be it_might_be it_might_also_be it_could_be it_could_also_be it_may_be "
    "it_may_also_be vielleicht möglicherweise peut-être quizás talvez forse возможно"
)
TOO = "also too possible as_well equally"

# "A. Wait, no: B": what stands before is taken back; "it looks like A, but B".
RETRACTIONS = "no wait sorry oops hmm hold_on nein non нет 不对 不對 不 いや 아니"  # and a mark
CORRECTIONS = "actually correction i_mean scratch_that on_second_thought"
TURNS = "but however aber mais pero ma mas но"
TURNS_BARE = "但是 但 而是 しかし 하지만"
OPENERS = "yes sure ok okay well right ja oui sí sim"  # "Yes, B"
