"""The wordings of the shop grammar, as data.

A wording may hold slots and alternatives: `{e}` is filled by the grammar, or by a wording drawn
from the list of that name; `[a|b]` is one of its alternatives. Of every list and every bracket
with three entries or more the LAST is reserved: training never draws it, so that questions which
use it measure wordings the model has not seen.
"""

from __future__ import annotations

WORDS: dict[str, tuple[str, ...]] = {
    "customers": (
        "customers", "customers", "clients", "buyers", "shoppers", "clients", "users",
        "account holders", "customers", "purchasers",
    ),
    "customer": (
        "customer", "customer", "client", "buyer", "shopper", "user", "account holder", "purchaser",
    ),
    "products": (
        "products", "products", "items", "articles", "goods", "things", "pieces of merchandise",
        "products", "wares",
    ),
    "product": ("product", "product", "item", "article", "thing", "ware"),
    "employees": (
        "employees", "employees", "staff members", "workers", "people", "team members",
        "members of staff", "employees", "colleagues",
    ),
    "employee": (
        "employee", "employee", "staff member", "worker", "team member", "member of staff",
        "colleague",
    ),
    "orders": ("orders", "orders", "orders", "purchases", "sales orders", "order records"),
    "reviews": (
        "reviews", "reviews", "ratings", "product reviews", "user reviews", "opinions",
        "pieces of feedback",
    ),
    "city": ("city", "city", "town", "home city"),
    "country": ("country", "country", "nation", "home country"),
    "segment": ("segment", "segment", "customer segment", "market segment"),
    "signup_year": ("signup year", "year of signup", "sign-up year", "registration year"),
    "category": ("category", "category", "product category", "kind", "type"),
    "department": ("department", "department", "team", "division"),
    "hire_year": ("hire year", "year of hiring", "hiring year", "year of hire"),
    "status": ("status", "status", "order status", "state"),
    "channel": ("channel", "channel", "sales channel", "order channel"),
    "order_year": ("order year", "year", "year of order", "year of the order"),
    "rating": ("rating", "rating", "score", "star rating"),
    "review_year": ("review year", "year", "year of review", "year of the review"),
    "cities": ("cities", "cities", "towns", "home cities"),
    "countries": ("countries", "countries", "nations", "home countries"),
    "segments": ("segments", "segments", "customer segments", "market segments"),
    "categories": ("categories", "categories", "product categories", "kinds", "types"),
    "departments": ("departments", "departments", "teams", "divisions"),
    "statuses": ("statuses", "order statuses"),
    "channels": ("channels", "channels", "sales channels", "order channels"),
    "price": ("price", "price", "cost", "selling price", "list price"),
    "stock": (
        "stock", "stock", "stock level", "number in stock", "quantity in stock", "stock quantity",
        "inventory",
    ),
    "salary": ("salary", "salary", "pay", "yearly pay", "salary", "annual salary", "wage"),
    "AVG": ("average", "average", "mean", "avg", "average", "typical"),
    "MAX": ("maximum", "highest", "largest", "biggest", "greatest", "max", "top"),
    "MIN": ("minimum", "lowest", "smallest", "min", "least"),
    "SUM": ("total", "overall", "combined", "sum of the", "accumulated", "summed"),
    "revenue": (
        "revenue", "revenue", "income", "sales revenue", "turnover", "sales", "total sales",
        "earnings", "takings",
    ),
    "show": (
        "List", "Show", "Give", "Display", "Return", "Find", "Show me", "Give me", "Get", "Tell me",
        "I need", "I want", "Find me", "Provide", "Fetch", "Retrieve", "Let me see", "Look up",
        "I would like", "Present", "Print",
    ),
    "opener": (
        "Please {q}", "Can you {q}", "Could you {q}", "I would like you to {q}", "Now {q}",
        "Hi, {q}", "Quickly {q}", "Would you {q}", "Would you please {q}", "Can you please {q}",
        "Let's {q}", "Ok, {q}", "Kindly {q}",
    ),
    "and": (" and", " and", ",", " and also", " and", " as well as"),
    "how_many": ("How many", "How many", "What number of", "Just how many"),
    "number": ("number", "count", "total number", "total count", "amount", "tally"),
    "each": (
        "per", "by", "for each", "for every", "in each", "grouped by", "across each", "split by",
        "broken down by", "according to", "within each",
    ),
    "most": (
        "most", "highest number of", "largest number of", "greatest amount of", "maximum number of",
        "greatest number of",
    ),
    "fewest": (
        "fewest", "lowest number of", "smallest number of", "minimum number of", "least number of",
    ),
}  # fmt: skip
"""Single words and short phrases, by the column, table, function or role they stand for."""

COMPARISONS: dict[str, tuple[str, ...]] = {
    "gt": (
        "above", "over", "greater than", "higher than", "of more than", "larger than",
        "bigger than", "exceeding",
    ),
    "lt": ("below", "under", "less than", "lower than", "of less than", "of under", "smaller than"),
    ">": ("more than", "over", "above", "greater than", "in excess of"),
    "<": ("fewer than", "less than", "under", "below", "not as many as"),
}  # fmt: skip

CONDITIONS: dict[str, tuple[str, ...]] = {
    "customers.city =": (
        "in {v}", "from {v}", "living in {v}", "based in {v}", "who live in {v}", "located in {v}",
        "that come from {v}", "whose city is {v}", "in the city of {v}", "of {v}", "with city {v}",
        "who are based in {v}", "whose home is {v}", "living around {v}", "with an address in {v}",
        "that live in {v}", "out of {v}", "residing in {v}",
    ),
    "customers.country =": (
        "in {v}", "from {v}", "from the country {v}", "in the country {v}", "whose country is {v}",
        "living in {v}", "that live in {v}", "based in {v}", "with country {v}",
        "who come from {v}", "whose nation is {v}", "from {v} as a country", "that are from {v}",
        "out of {v}", "whose home country is {v}",
    ),
    "customers.segment =": (
        "in the {v} segment", "of the {v} segment", "belonging to the {v} segment",
        "from the {v} segment", "whose segment is {v}", "with segment {v}",
        "who are in the {v} segment", "in segment {v}", "that belong to segment {v}",
        "which belong to the {v} segment", "that are {v} customers", "in {v}", "of type {v}",
        "assigned to the {v} segment",
    ),
    "customers.segment <>": (
        "not in the {v} segment", "outside the {v} segment", "whose segment is not {v}",
        "that are not in the {v} segment", "in any segment except {v}",
        "not belonging to the {v} segment", "other than {v} ones", "without the {v} segment",
        "of all segments other than {v}",
    ),
    "customers.signup_year =": (
        "who signed up in {v}", "who joined in {v}", "with signup year {v}",
        "that registered in {v}", "who registered in {v}", "who became {customers} in {v}",
        "that joined us in {v}", "signed up in {v}", "whose signup year is {v}",
        "who created their account in {v}",
        "who opened an account in {v}", "registered in {v}", "new in {v}",
        "that signed up during {v}",
    ),
    "customers.signup_year >": (
        "who signed up after {v}", "who joined after {v}", "that registered after {v}",
        "who joined later than {v}", "with a signup year after {v}", "registered after {v}",
        "that signed up later than {v}", "whose signup year is after {v}",
        "who became {customers} after {v}", "who opened an account after {v}", "newer than {v}",
        "signed up after {v}", "that joined us after {v}",
    ),
    "customers.signup_year <": (
        "who signed up before {v}", "who joined before {v}", "that registered before {v}",
        "who joined earlier than {v}", "with a signup year before {v}",
        "that signed up earlier than {v}", "whose signup year is before {v}",
        "who became {customers} before {v}", "who opened an account before {v}",
        "registered before {v}", "older than {v}", "signed up before {v}",
        "that joined us before {v}",
    ),
    "products.category =": (
        "in the {v} category", "of category {v}", "belonging to category {v}",
        "from the {v} category", "in category {v}", "whose category is {v}", "of the {v} category",
        "with category {v}", "of type {v}", "of the {v} kind", "that belong to the {v} category",
        "listed under {v}", "in {v}", "that are {v}", "from {v}", "which are {v}",
        "in the {v} section", "under {v}", "that fall under {v}",
    ),
    "products.category <>": (
        "not in the {v} category", "outside the {v} category", "whose category is not {v}",
        "that are not in category {v}", "of any category except {v}", "other than {v}",
        "except {v}", "without the {v} category", "of all categories other than {v}",
    ),
    "products.price >": (
        "with a price above {v}", "that cost more than {v}", "priced above {v}",
        "more expensive than {v}", "priced over {v}", "costing more than {v}",
        "that are more expensive than {v}", "dearer than {v}", "with a price {gt} {v}",
        "whose price is {gt} {v}", "for more than {v}", "over {v} in price", "which cost over {v}",
        "sold for more than {v}", "that cost over {v}", "with a price tag {gt} {v}",
    ),
    "products.price <": (
        "with a price below {v}", "that cost less than {v}", "priced under {v}", "cheaper than {v}",
        "priced below {v}", "costing less than {v}", "that are cheaper than {v}",
        "less expensive than {v}", "with a price {lt} {v}", "whose price is {lt} {v}",
        "for less than {v}", "under {v} in price", "which cost under {v}", "sold for less than {v}",
        "that cost under {v}", "with a price tag {lt} {v}",
    ),
    "products.price BETWEEN": (
        "with a price between {v} and {w}", "priced between {v} and {w}",
        "that cost between {v} and {w}", "costing from {v} to {w}", "with a price from {v} to {w}",
        "whose price is between {v} and {w}", "in the price range {v} to {w}",
        "between {v} and {w} in price", "at a price from {v} to {w}", "that cost {v} to {w}",
        "costing between {v} and {w}",
    ),
    "products.stock >": (
        "with a stock above {v}", "with more than {v} in stock", "with stock {gt} {v}",
        "of which we have more than {v}", "with more than {v} units in stock",
        "having more than {v} pieces in stock", "whose stock is {gt} {v}",
        "stocked more than {v} times", "that have more than {v} left", "with over {v} in stock",
        "with more than {v} left in stock", "stocked above {v}", "with an inventory {gt} {v}",
    ),
    "products.stock <": (
        "with a stock below {v}", "with fewer than {v} in stock", "with stock {lt} {v}",
        "of which we have fewer than {v}", "with less than {v} units in stock",
        "having fewer than {v} pieces in stock", "whose stock is {lt} {v}",
        "that have fewer than {v} left", "with under {v} in stock",
        "with less than {v} left in stock", "stocked below {v}", "with an inventory {lt} {v}",
    ),
    "employees.department =": (
        "in the {v} department", "working in {v}", "from the {v} department", "in {v}",
        "who work in {v}", "of the {v} department", "whose department is {v}", "on the {v} team",
        "in the {v} team", "that belong to {v}", "in department {v}", "employed in {v}",
        "who belong to the {v} department", "that work for {v}", "at {v}",
        "assigned to the {v} department",
    ),
    "employees.salary >": (
        "with a salary above {v}", "earning more than {v}", "who earn more than {v}",
        "with a salary {gt} {v}", "paid more than {v}", "making more than {v}",
        "who are paid more than {v}", "who make over {v}", "whose salary is {gt} {v}",
        "with a pay {gt} {v}", "with more than {v} salary", "that earn over {v}",
        "earning above {v}", "with wages above {v}", "who get more than {v}",
    ),
    "employees.salary <": (
        "with a salary below {v}", "earning less than {v}", "who earn less than {v}",
        "with a salary {lt} {v}", "paid less than {v}", "making less than {v}",
        "who are paid less than {v}", "who make under {v}", "whose salary is {lt} {v}",
        "with a pay {lt} {v}", "with less than {v} salary", "that earn under {v}",
        "earning below {v}", "with wages below {v}", "who get less than {v}",
    ),
    "employees.hire_year =": (
        "hired in {v}", "who were hired in {v}", "who started in {v}", "with hire year {v}",
        "that joined in {v}", "who began in {v}", "whose hire year is {v}",
        "who joined the company in {v}", "who came in {v}", "that were taken on in {v}",
        "starting in {v}", "recruited in {v}",
    ),
    "employees.hire_year >": (
        "hired after {v}", "who were hired after {v}", "who started after {v}",
        "with a hire year after {v}", "that joined after {v}", "hired later than {v}",
        "who joined the company after {v}", "who came after {v}", "that were taken on after {v}",
        "starting after {v}", "recruited after {v}",
    ),
    "employees.hire_year <": (
        "hired before {v}", "who were hired before {v}", "who started before {v}",
        "with a hire year before {v}", "that joined before {v}", "hired earlier than {v}",
        "who joined the company before {v}", "who came before {v}", "that were taken on before {v}",
        "starting before {v}", "recruited before {v}",
    ),
    "orders.status =": (
        "with status {v}", "that are {v}", "whose status is {v}", "that were {v}", "which are {v}",
        "marked as {v}", "with the status {v}", "in status {v}", "that have been {v}",
        "having status {v}", "currently {v}", "with {v} as status", "that got {v}", "labelled {v}",
        "which were {v}", "in the {v} state",
    ),
    "orders.status <>": (
        "that are not {v}", "whose status is not {v}", "with a status other than {v}",
        "that were not {v}", "which are not {v}", "without the status {v}", "excluding {v}",
        "not {v}", "with any status except {v}",
    ),
    "orders.channel =": (
        "through the {v} channel", "from the {v} channel", "via the {v} channel", "via {v}",
        "made through {v}", "placed via {v}", "whose channel is {v}", "with channel {v}", "by {v}",
        "placed through the {v} channel", "over the {v} channel", "using the {v} channel",
        "coming from {v}", "received via {v}", "that used {v}", "on the {v} channel",
        "that came in through {v}",
    ),
    "orders.order_year =": (
        "placed in {v}", "made in {v}", "from the year {v}", "in {v}", "from {v}", "of {v}",
        "that were placed in {v}", "during {v}", "in the year {v}", "with order year {v}",
        "which were made in {v}", "dated {v}", "for {v}", "for the year {v}", "received in {v}",
    ),
    "orders.order_year >": (
        "placed after {v}", "made after {v}", "dated after {v}", "after {v}", "later than {v}",
        "that were placed after {v}", "from after {v}", "with an order year after {v}",
        "that were made after {v}", "newer than {v}", "received after {v}",
    ),
    "orders.order_year <": (
        "placed before {v}", "made before {v}", "dated before {v}", "before {v}",
        "earlier than {v}", "that were placed before {v}", "from before {v}",
        "with an order year before {v}", "that were made before {v}",
        "older than {v}", "received before {v}",
    ),
    "reviews.rating =": (
        "with rating {v}", "with {v} stars", "rated {v}", "with a rating of {v}", "of {v} stars",
        "giving {v} stars", "whose rating is {v}", "that give {v} stars", "with exactly {v} stars",
        "at {v} stars", "scored {v}",
    ),
    "reviews.rating >": (
        "with a rating above {v}", "with more than {v} stars", "rated above {v}",
        "rated higher than {v}", "with a rating {gt} {v}", "better than {v} stars",
        "whose rating is {gt} {v}", "that give more than {v} stars", "over {v} stars",
        "above {v} stars", "scored above {v}",
    ),
    "reviews.rating <": (
        "with a rating below {v}", "with fewer than {v} stars", "rated below {v}",
        "rated lower than {v}", "with a rating {lt} {v}", "worse than {v} stars",
        "whose rating is {lt} {v}", "that give fewer than {v} stars", "under {v} stars",
        "below {v} stars", "scored below {v}",
    ),
    "reviews.review_year =": (
        "written in {v}", "from {v}", "posted in {v}", "in {v}", "left in {v}", "from the year {v}",
        "made in {v}", "dated {v}", "of {v}", "submitted in {v}",
    ),
}  # fmt: skip
"""Conditions as they follow a noun, by column and operator; `{v}` is the value."""
