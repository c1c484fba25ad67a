#pragma once

// Letters and numbers that Unicode 16.0 has and unicode-data.cpp (15.1) has not. Where they stand decides how a
// word is cut, so a tokenizer that knows them cuts otherwise. Source: UnicodeData.txt of both versions, categories L*, N*.

#include "unicode.h"

#include <cstdint>
#include <initializer_list>

struct unicode_16_range {
    uint32_t first;
    uint32_t last;
    uint16_t flags;
};

inline constexpr std::initializer_list<unicode_16_range> unicode_16_ranges = {
    { 0x01C89, 0x01C8A, unicode_cpt_flags::LETTER }, // Cyrillic
    { 0x0A7CB, 0x0A7CD, unicode_cpt_flags::LETTER }, // Latin
    { 0x0A7DA, 0x0A7DC, unicode_cpt_flags::LETTER },
    { 0x105C0, 0x105F3, unicode_cpt_flags::LETTER }, // Todhri
    { 0x10D40, 0x10D49, unicode_cpt_flags::NUMBER }, // Garay
    { 0x10D4A, 0x10D65, unicode_cpt_flags::LETTER },
    { 0x10D6F, 0x10D85, unicode_cpt_flags::LETTER },
    { 0x10EC2, 0x10EC4, unicode_cpt_flags::LETTER }, // Arabic
    { 0x11380, 0x11389, unicode_cpt_flags::LETTER }, // Tulu-Tigalari
    { 0x1138B, 0x1138B, unicode_cpt_flags::LETTER },
    { 0x1138E, 0x1138E, unicode_cpt_flags::LETTER },
    { 0x11390, 0x113B5, unicode_cpt_flags::LETTER },
    { 0x113B7, 0x113B7, unicode_cpt_flags::LETTER },
    { 0x113D1, 0x113D1, unicode_cpt_flags::LETTER },
    { 0x113D3, 0x113D3, unicode_cpt_flags::LETTER },
    { 0x116D0, 0x116E3, unicode_cpt_flags::NUMBER }, // Myanmar
    { 0x11BC0, 0x11BE0, unicode_cpt_flags::LETTER }, // Sunuwar
    { 0x11BF0, 0x11BF9, unicode_cpt_flags::NUMBER },
    { 0x13460, 0x143FA, unicode_cpt_flags::LETTER }, // Egyptian Hieroglyphs
    { 0x16100, 0x1611D, unicode_cpt_flags::LETTER }, // Gurung Khema
    { 0x16130, 0x16139, unicode_cpt_flags::NUMBER },
    { 0x16D40, 0x16D6C, unicode_cpt_flags::LETTER }, // Kirat Rai
    { 0x16D70, 0x16D79, unicode_cpt_flags::NUMBER },
    { 0x18CFF, 0x18CFF, unicode_cpt_flags::LETTER }, // Khitan
    { 0x1CCF0, 0x1CCF9, unicode_cpt_flags::NUMBER }, // Outlined digits
    { 0x1E5D0, 0x1E5ED, unicode_cpt_flags::LETTER }, // Ol Onal
    { 0x1E5F0, 0x1E5F0, unicode_cpt_flags::LETTER },
    { 0x1E5F1, 0x1E5FA, unicode_cpt_flags::NUMBER },
};
