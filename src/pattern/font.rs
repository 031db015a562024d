//! Ten digits of five by seven dots.

/// Dots across a digit; a cell is one wider, for the gap.
pub(super) const CELL: u32 = 6;
/// Dots down a digit.
pub(super) const ROWS: u32 = 7;

/// The rows of each digit from the top; the leftmost dot is bit 4.
const DIGITS: [[u8; ROWS as usize]; 10] = [
    [0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110],
    [0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110],
    [0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111],
    [0b11110, 0b00001, 0b00001, 0b01110, 0b00001, 0b00001, 0b11110],
    [0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010],
    [0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110],
    [0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110],
    [0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000],
    [0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110],
    [0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100],
];

/// Whether `digit` has a dot at this place of its cell; nothing has one outside.
pub(super) fn dot(digit: u8, column: u32, row: u32) -> bool {
    let bits = DIGITS.get(usize::from(digit)).and_then(|rows| rows.get(row as usize));
    column < 5 && bits.is_some_and(|bits| bits >> (4 - column) & 1 == 1)
}
